"""What the commands of `posterpipe` do, a module each.

What belongs here: choosing what is worked on, and printing what came of it. What does not: the
options and their help (`cli`), the work itself (`core`, `defs`), the page for designers (`studio`).
"""
