"""What of a foreign error's message people read."""

from __future__ import annotations

from posterpipe.core.errors import first_line, named_line


def test_an_error_is_told_in_one_line_whatever_its_message_is() -> None:
    assert first_line(ValueError("\n  no such layer\nmore")) == "no such layer"
    for empty in ("", " \n "):
        assert first_line(ValueError(empty)) == "ValueError"
        assert named_line(ValueError(empty)) == "ValueError: no message"
    assert named_line(KeyError("a")) == "KeyError: 'a'"
    assert len(named_line(ValueError("x" * 999))) == len("ValueError: ") + 300
