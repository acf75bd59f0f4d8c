"""Tables for pages."""

from __future__ import annotations

import pytest

from fastpref.tables import markdown_table


def test_words_stand_to_the_left_and_numbers_to_the_right() -> None:
    assert markdown_table(("a", "b", "n"), [("x", "`y`", "1")], words=2) == [
        "| a | b | n |",
        "| --- | --- | ---: |",
        "| x | `y` | 1 |",
    ]


def test_a_row_of_another_length_than_the_header_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells, got 1"):
        markdown_table(("a", "b"), [("x",)])
