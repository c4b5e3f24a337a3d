"""Tables as plain text."""

from __future__ import annotations

from progtuning_kernels.text_table import text_table


def test_columns_are_aligned_and_lines_end_with_their_text():
    rows = [("unit", "bytes", "why"), ("block 10", "7", ""), ("head", "1,024", "tied")]
    assert text_table(rows, left=(0, 2)) == [
        "unit      bytes  why",
        "block 10      7",
        "head      1,024  tied",
    ]
