"""The Dagster layer: one module a stage, each asset a thin call into `core`.

What belongs here: assets, checks, jobs, resources, and what people see of them in the UI. What does
not: algorithms (`posterpipe.core`) and their composition (`posterpipe.definitions`).

Modules of `core` are imported inside the steps. Loading the code location then costs hardly more
than loading Dagster: pandas alone would add a third of a second, diffusers six.
"""

import atexit
import gc

import dagster  # noqa: F401

# What this import has made stays for good: the collector need not look through it again and again
# while the modules of this package are loaded (`load_code_location` in `benchmarks`).
gc.freeze()
# At the end everything is let go as usual: bindings such as DuckDB's count what is left then.
atexit.register(gc.unfreeze)
