"""Small models of the real architectures, and the drawn world they are trained on.

What belongs here: drawing scenes and posters (`world`, `objects`, `render`, `posters`), their words
(`captions`), training the models (`train`, `stages`), measuring them (`evaluate`) and saying what
they are (`cards`). What does not: anything that the pipeline needs at run time. It takes these
models as it takes any others, from their folders.
"""
