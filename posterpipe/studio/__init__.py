"""The studio: the web page on which designers make posters and look at captions and scores.

What belongs here: its pages (`app`, `screens`), how they look (`look`), and the rooms below them
that know no Streamlit: the queue before the one model (`engine`), drawing (`painter`, in a process
of its own: `worker`), which models there are (`served`), captions (`caption_desk`), the published
scores (`published`), the command (`serve`). What does not: how images are drawn (`core.sampler`),
titles (`core.typography`), scores (`core.metrics`), captions on disk (`core.captions`).

Importing this package loads nothing heavy.
"""
