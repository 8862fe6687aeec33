"""What posterpipe does, usable from a notebook and testable alone.

What belongs here: reading posters, preparing them, captioning, training, drawing, scoring, and the
store that remembers all of it. What does not: anything of Dagster (`posterpipe.defs`), and the
drawing and training of the starter world (`posterpipe.starter`). Modules that need torch import it
inside functions, so that loading the code location stays quick.
"""
