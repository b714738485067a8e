"""How the forms of queries and keys turn with the offset, as the page draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from headgram.forms.variants import FOLDED, RAW, Variant
from headgram.results.tables import of_place, read_table

#: Columns of the table `rotary` that are drawn.
AT_OFFSETS = ("cosine", "norm", "transposed", "symmetry", "trace")


@dataclass(frozen=True)
class Positions:
    """One form of the heads of a stack: `O` offsets, `P` planes; NaN in layers that positions do not turn.

    Attributes
    ----------
    offsets : (O,)
        In tokens.
    at : (5, L, H, O)
        Columns of AT_OFFSETS.
    expected : (L, O)
        The cosine by chance.
    wavelengths : (L, P)
        In tokens; NaN of a plane that does not turn, and of the last, which holds all rows that no rotation touches.
    share : (L, H, P)
        Of the energy.
    share_expected : (L, P)
        By chance.
    """

    offsets: np.ndarray
    at: np.ndarray
    expected: np.ndarray
    wavelengths: np.ndarray
    share: np.ndarray
    share_expected: np.ndarray


def read_positions(paths: Mapping[str, Path], stack: str, layers: np.ndarray, heads: int) -> dict[str, Positions]:
    """By `raw` and `folded`, what the tables `rotary` and `frequencies` say of a stack; empty where positions turn nothing."""
    found = {}
    for norm in (RAW, FOLDED):
        place = Variant("qk", norm).name, stack
        rotary, waves = (of_place(place, read_table(paths[name])) for name in ("rotary", "frequencies"))
        if not len(rotary):
            continue
        at = rotary.to_pandas().sort_values(["layer", "head", "offset"])
        offsets = np.unique(at["offset"])
        turned = np.searchsorted(layers, np.unique(at["layer"]))
        columns = np.full((len(AT_OFFSETS) + 1, len(layers), heads, len(offsets)), np.nan)
        columns[:, turned] = at[[*AT_OFFSETS, "expected"]].to_numpy().T.reshape(-1, len(turned), heads, len(offsets))
        planes = int(pc.max(waves["plane"]).as_py()) + 2  # and what is still
        by_plane = np.full((3, len(layers), heads, planes), np.nan)
        rows = waves.to_pandas()
        plane = rows["plane"].fillna(planes - 1).to_numpy(int)
        by_plane[:, np.searchsorted(layers, rows["layer"]), rows["head"], plane] = rows[["wavelength", "share", "expected"]].T
        found[norm] = Positions(
            offsets=offsets,
            at=columns[:-1],
            expected=columns[-1, :, 0],
            wavelengths=by_plane[0, :, 0],
            share=by_plane[1],
            share_expected=by_plane[2, :, 0],
        )
    return found
