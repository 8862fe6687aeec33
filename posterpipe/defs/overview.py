"""The overview that newcomers read in the Dagster UI.

What belongs here: words that hold for the graph as a whole. What does not: what one asset is (its
docstring) and when it runs (`timing`), guides (`docs/`).

Dagster 1.13 shows no description of a code location. The overview is the description of the job
`everything`, which the list of jobs shows first, and metadata of the definitions.
"""

OVERVIEW = """\
**posterpipe** turns a folder of movie posters into a fine-tuned Stable Diffusion model, and into
evidence of how good that model is.

- `ingest`: `raw_posters`, `holdout_posters`: every file that arrived, judged
- `dataset`: resized, captioned by BLIP or by people, written as `training_csv`
- `training`: `dreambooth_checkpoint`: Stable Diffusion fine-tuned on that training set
- `generation`: the prompt suite drawn by the base and by the tuned model, from the same noise
- `scoring`: CLIP and other measures in DuckDB; the champion is the checkpoint that is served
- `reports`: dbt models over the scores, the published database, pictures and pages to look at

**What runs by itself.** The sensor `arrivals` notices posters, captions and prompts that came,
changed or went. `automation` rebuilds what depends on a change, and nothing else. The schedule
`training` trains at night when enough is new, and says each time why it did or did not.
`stale_sweep` looks for what the others missed. `failure_alerts` tells people of failed runs
and checks, once a receiver is configured.

**What to do by hand.** Nothing has to be. The job `everything` brings all of it up to date; what
exists already is taken from the store and not computed again. `retrain` does not wait for the
night.

**Where to look.** Each asset shows thumbnails, tables and plots of its numbers; its checks say what
they expected and found. `score_report` has the link to the report that most people read. The tag
`posterpipe/reason` of a run says why it was started. Guides are in `docs/` of the project.
"""
