"""Care of the store: what people do with it between runs.

What belongs here: what nobody needs any more (`garbage`), a copy of the rest (`backup`), and
whether all is there that the tables name (`presence`). What does not: writing and reading the store
(`store`).
"""
