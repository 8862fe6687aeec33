"""What is written down about where things come from, and checkpoints that know their training set.

What belongs here: the records that steps leave in the store, each written once and never changed,
and refusing a checkpoint that is not the one it is taken for. What does not: telling it all for one
score (`trace`), the keys that decide what is computed again (no record changes one), and the
warehouse, which holds copies of some records for analysts.

`environments` has the code that ran, `lineages` the posters of training sets, `checkpoints` what is
known of models, and `records` writes all that a step leaves.

Records are rows of the store's index (`Store.results`):

    environment    id -> versions of posterpipe, of its source, of Python and of packages
    table          name/version -> run, asset's code version, environment, versions of the inputs
    training_set   version/lineage -> number of images, and the steps that led to it, from the
                   posters on
    checkpoint     id -> training set, lineage, base model, settings, packages, run

and the posters of each training set, as `lineages/<training set>.<lineage>.parquet`. One training
set may have come about in several ways: from another poster of the same pixels, or with a caption
that a person wrote in the model's very words. Each is a lineage, named by what it holds, and
`lineages/<training set>.json` tells which was the last. Older stores have one lineage a training
set, without a name.
"""
