"""Errors in words.

What belongs here: what of a foreign error's message goes into ours. What does not: the errors that
posterpipe raises, which lie beside what raises them.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of the error's message; the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def named_line(error: BaseException) -> str:
    """The error's type and the first line of its message, at most 300 characters of it."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
