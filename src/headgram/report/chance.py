"""What chance gives of what is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgram.geometry.nulls import (
    Null,
    cosine_null,
    overlap_null,
    part_cosine_null,
    symmetry_null,
    symmetry_score_null,
)
from headgram.results.tables import HEAD_NUMBERS, SIDES

#: Colours reach so many times as far from the mean by chance as the best of all random ones: what is chance stays pale.
PALE = 3


def nulls(facts: Mapping[str, Any]) -> dict[str, Null]:
    """Of every column of `heads`, comparison of forms and side that has one; `facts` is a row of `models`."""
    width, kept = int(facts["hidden"]), int(facts["directions"])
    return {
        "symmetry": symmetry_null(width),
        "symmetry_score": symmetry_score_null(width),
        "trace_z": Null(0.0, 1.0, two_sided=True),
        **dict.fromkeys(("cosine", "transposed"), cosine_null(width)),
        **dict.fromkeys(("symmetric", "antisymmetric"), part_cosine_null(width)),
        **dict.fromkeys(SIDES, overlap_null(kept, width)),
    }


def band(null: Null | None, count: int, name: str = "chance") -> list[dict[str, float | str]]:
    """Where the best of so many numbers lies by chance, and where its axis must begin and end; nothing without a null."""
    if null is None:
        return []
    best = null.best_of(count) - null.mean
    ends = {"low": -best, "high": best, "from": -PALE * best, "to": PALE * best}
    return [{"name": name, **{end: null.mean + place for end, place in ends.items()}}]


def for_page(facts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each number that is drawn: its mean and deviation by chance, and how far from the mean the best of all values lies.

    `best` is over all heads, or all pairs of layers and heads; `best_mean` over the means of pairs of layers; `best_pair` over
    all pairs of heads.
    """
    layers, heads = facts["layers"], facts["heads"]
    pairs, of_heads = (max(1, count * (count - 1) // 2) for count in (layers, layers * heads))
    return {
        name: {
            "mean": null.mean,
            "deviation": null.deviation,
            "best": null.best_of((layers if name in HEAD_NUMBERS else pairs) * heads) - null.mean,
            "best_mean": null.mean_of(heads).best_of(pairs) - null.mean,
            "best_pair": null.best_of(of_heads) - null.mean,
        }
        for name, null in nulls(facts).items()
    }
