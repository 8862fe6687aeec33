"""Side-by-side benchmarks: posterpipe against what a user would use instead.

One module a topic, each with a `run() -> list[Row]`. Both sides run in the same session and do the
same work; ratios are what counts, since machines are noisy. `python -m benchmarks` runs them.
"""
