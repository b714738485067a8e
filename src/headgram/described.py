"""How objects say what they are: in a line and a table, as text and, in notebooks, as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from headgram.foreign import plain

#: Rows that are shown.
_MOST_ROWS = 20


class Described:
    """Gives its subclasses a text and an HTML form, from what `_described` says."""

    def _described(self) -> tuple[str, Sequence[Mapping[str, object]]]:
        """What this is, in a line; and rows of facts, all with the same names."""
        raise NotImplementedError

    def __repr__(self) -> str:
        line, header, rows = self._cells()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows) if row]
        return "\n".join([line, *(f"  {row}".rstrip() for row in table), *self._rest("  … and {} more")])

    def _repr_html_(self) -> str:
        line, header, rows = self._cells()
        tagged = [("th", header), *(("td", row) for row in rows)]
        cells = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in tagged]
        table = "".join(f"<tr>{row}</tr>" for row in cells if row)
        return f"<p><b>{html.escape(line)}</b></p><table>{table}</table>{''.join(self._rest('<p>… and {} more</p>'))}"

    def _cells(self) -> tuple[str, list[str], list[list[str]]]:
        line, rows = self._described()
        shown = [[plain(value, 60) for value in row.values()] for row in rows[:_MOST_ROWS]]
        return plain(line), list(rows[0]) if rows else [], shown

    def _rest(self, text: str) -> list[str]:
        more = len(self._described()[1]) - _MOST_ROWS
        return [text.format(more)] if more > 0 else []


def layer_ranges(layers: Iterable[int]) -> str:
    """`(0, 1, 2, 5)` as `0–2, 5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
