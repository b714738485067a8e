"""Colours of heatmaps, held against chance: they reach so far that noise is pale, and the bar marks where chance ends.

The page does the same in `looks.js`, where colours depend on the theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgram.geometry.nulls import Null
from headgram.report.chance import PALE

#: Blue, neutral, orange: told apart by everybody.
DIVERGING = ("#1f4e9c", "#5a8fd0", "#b4cfea", "#f5f4f2", "#f3c69a", "#d98032", "#8f4a06")
#: A mark is apart from the middle of a bar if it is so large a share of it away.
_APART = 0.2


@dataclass(frozen=True)
class Colours:
    """The colours of a heatmap.

    Attributes
    ----------
    domain
        The values of the first and the last colour.
    scheme
        A scheme of Vega, or colours in the order of their values.
    marks
        What the bar names: values, and what it calls them.
    note
        What stands above the bar.
    """

    domain: tuple[float, float]
    scheme: str | Sequence[str]
    marks: tuple[tuple[float, str], ...]
    note: str | None = None


def around(centre: float, largest: float, null: Null | None = None, count: int = 1) -> Colours:
    """Of `count` numbers that lie up to `largest` from a centre, on either side; with a null, the centre is its mean."""
    best = null.best_of(count) - centre if null else 0.0
    reach = max(largest, PALE * best) or 1.0
    apart = best > _APART * reach
    chance = (
        [(centre - best, "chance"), (centre + best, "chance")] if apart else [(centre, "chance" if null else _number(centre))]
    )
    ends = (centre - reach, centre + reach)
    return Colours(ends, DIVERGING, ((ends[0], _number(ends[0])), *chance, (ends[1], _number(ends[1]))), _note(null))


def above(largest: float, null: Null, count: int) -> Colours:
    """Of `count` numbers between 0 and `largest`."""
    reach = max(largest, min(1.0, PALE * null.best_of(count))) or 1.0
    apart = [(reach * share, _number(reach * share)) for share in (0.5, 1) if null.mean < (share - _APART) * reach]
    return Colours((0.0, reach), "viridis", ((null.mean, "chance"), *apart), _note(null))


def times_chance(largest: float) -> Colours:
    """Of numbers that are 1 by chance; what is less is no more than chance."""
    reach = max(largest, float(PALE))
    return Colours((1.0, reach), DIVERGING[3:], ((1.0, "chance"), (reach, f"{_number(reach)} × chance")))


def spread(ends: tuple[float, float], chance: float | None = None) -> Colours:
    """Of numbers between two ends, and what chance gives if that is known; it is always among the colours."""
    ends = ends if chance is None else (min(*ends, chance), max(*ends, chance))
    ends = ends if ends[0] < ends[1] else (ends[0], ends[0] + 1)
    middle = (sum(ends) / 2, _number(sum(ends) / 2)) if chance is None else (chance, "chance")
    apart = [(end, _number(end)) for end in ends if abs(end - middle[0]) > _APART * (ends[1] - ends[0])]
    return Colours(ends, "viridis", (middle, *apart), None if chance is None else f"by chance {chance:.4g}")


def _note(null: Null | None) -> str | None:
    return f"by chance {null.mean:.4g} ± {null.deviation:.2g}" if null else None


def _number(value: float) -> str:
    """Two digits, as people write them."""
    return f"{float(f'{value:.2g}'):g}".replace("-", "−")
