"""The tokens of a stack's directions, as the page shows them: the outermost of the first directions of every head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from headgram.results.paths import Place
from headgram.results.tables import TOKENS as RECORDED
from headgram.results.tables import read_parts

#: Directions of a head that a page shows, and tokens at each of their ends.
DIRECTIONS, TOKENS = 3, 5
_SIDES = ["right", "left"]
#: A page's numbers have 13 bits: places in a longer list are written as two of them.
_DIGIT = 4096


@dataclass(frozen=True)
class HeadTokens:
    """The outermost tokens of `D` directions of `H` heads in `L` layers: on the right and the left side, at both ends.

    Attributes
    ----------
    texts
        Each once; the first one stands for no token.
    places : (L, H, 2, D, 2, n) int
        Of `texts`.
    deviations : (L, H, 2, D, 2)
        Of the outermost token of each end.
    share : (L, H, 2, D)
        Of the energy of all tokens' rows along a direction.
    chance
        What the outermost deviation reaches by chance.
    """

    texts: list[str]
    places: np.ndarray
    deviations: np.ndarray
    share: np.ndarray
    chance: float

    def arrays(self) -> dict[str, np.ndarray]:
        """What a page holds in numbers."""
        digits = np.stack([self.places // _DIGIT, self.places % _DIGIT])
        return {"places": digits, "deviations": self.deviations, "share": self.share}


def read_tokens(path: Path, place: Place, layers: np.ndarray, heads: int) -> HeadTokens | None:
    """The tokens of one circuit of a stack from the table of that name; None if it holds none.

    Parameters
    ----------
    layers : (L,)
        True indices.
    """
    circuit, stack = place
    parts = read_parts(path, circuit=circuit, stack=stack)
    table = pa.concat_tables([RECORDED.empty_table(), *parts]).to_pandas()
    table = table[(table["direction"] < DIRECTIONS) & (table["place"] < TOKENS)]
    if table.empty:
        return None
    places, texts = pd.factorize(table["text"].where(table["text"] != "", "#" + table["token"].astype(str)))
    side = np.array([_SIDES.index(each) for each in table["side"]])
    head = np.searchsorted(layers, table["layer"]), table["head"].to_numpy(), side, table["direction"].to_numpy()
    end = *head, (table["sign"] < 0).to_numpy().astype(int)
    shape = len(layers), heads, len(_SIDES), int(table["direction"].max()) + 1
    found = np.zeros((*shape, 2, int(table["place"].max()) + 1), dtype=int)
    found[*end, table["place"]] = places + 1
    deviations, share = np.zeros((*shape, 2)), np.zeros(shape)
    first = (table["place"] == 0).to_numpy()
    deviations[tuple(each[first] for each in end)] = table["deviations"][first]
    share[head] = table["share"]
    return HeadTokens(["", *texts], found, deviations, share, float(table["chance"].iloc[0]))
