"""Metrics: workers that look at images and give one number each.

What belongs here: a module a family of metrics. A metric is a class made once from its settings
and called on batches; its `metric_id` names the encoder, its weights, the preprocessing and the
version, so that a changed metric is a new column of results and never mixes with the old one.
What does not: the tables the numbers go to (`warehouse`) and what they add up to (`statistics`).

`base` is what all share and `encoders` what makes embeddings; `clip` is the similarity of image and
prompt, `specificity` what of it other prompts have not, `fidelity` the similarity of images and
posters with copies, `diversity` that of the images of one prompt, `legibility` whether the title
can be read (recorded by `titles_read`), `pickscore` what people would choose.
"""
