"""Tables that reports print, and the same tables as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby


@dataclass(frozen=True)
class Table:
    """Rows of cells. The columns of `left` begin at one place, the others end at one."""

    rows: Sequence[Sequence[str]]
    left: Collection[int]
    head: bool = True  # whether the first row names the columns


def text_table(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """One line per row; the columns of `left` begin at one place, the others end at one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if c in left else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_text(parts: Iterable[str | Table]) -> str:
    """Lines and tables of a report, for print."""
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else text_table(part.rows, part.left)
    return "\n".join(lines)


def as_html(parts: Iterable[str | Table]) -> str:
    """The same characters, for `_repr_html_`; colours and fonts are those of the page around it."""
    html = []
    for is_line, group in groupby(parts, key=lambda part: isinstance(part, str)):
        if is_line:
            lines = "\n".join(map(str, group)).strip("\n")
            html.append(f'<div style="white-space: pre-wrap">{escape(lines)}</div>' * bool(lines))
        else:
            html += [_html_table(table) for table in group if isinstance(table, Table)]
    return "\n".join(filter(None, html))


def _html_table(table: Table) -> str:
    def line(row: Sequence[str], tag: str) -> str:
        styles = (
            "left" if c in table.left else "right; white-space: nowrap" for c in range(len(row))
        )
        cells = (
            f'<{tag} style="text-align: {style}">{escape(cell)}</{tag}>'
            for style, cell in zip(styles, row, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head = [f"<thead>{line(table.rows[0], 'th')}</thead>"] if table.head else []
    body = [line(row, "td") for row in table.rows[len(head) :]]
    return "\n".join(["<table>", *head, "<tbody>", *body, "</tbody></table>"])
