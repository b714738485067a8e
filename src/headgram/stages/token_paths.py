"""The table `token_paths`: what heads do between tokens, and what the strongest K-compositions do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from headgram.geometry.composition import composed
from headgram.geometry.costs import BLOCK_BYTES
from headgram.geometry.eigenvalues import Eigenvalues
from headgram.geometry.token_space import TokenProducts, between_tokens
from headgram.results.tables import COPYING, TOKEN_PATHS, labelled, read_table
from headgram.stages.extracted import ExtractedModel, single

#: Given a stack, a circuit and the width of its stream: the products of the token tables that its heads meet, and whether all
#: norms between are folded in; None if they meet no tokens.
Met = Callable[[str, str, int], tuple[TokenProducts, bool] | None]


def token_paths(extracted: ExtractedModel, channels: Path | None, met: Met, device: str) -> Iterator[pa.Table]:
    """The rows of every head, circuit by circuit, and of the strongest K-compositions.

    Parameters
    ----------
    channels
        The table `channels`, where compositions were measured.
    """
    yield TOKEN_PATHS.empty_table()
    for stack, circuit in extracted.places:
        files = extracted.files(stack, circuit, extracted.folds(stack, circuit))
        if (meeting := met(stack, circuit, files.width)) is not None:
            tables, whole = meeting
            for block in files.blocks(files.layers, BLOCK_BYTES["cpu"]):
                layers, heads = (np.array(each) for each in block)
                found = between_tokens(files.read(*block, device=device), tables)
                places = {"layer": layers.repeat(len(heads)), "head": np.tile(heads, len(layers))}
                yield _table(stack, circuit, places, found, files.is_folded and whole)
    if channels is not None:
        pairs = read_table(channels)
        pairs = pairs.filter((pc.field("kind") == "k") & (pc.field("writer") == pc.field("stack")))
        for stack in pairs["stack"].unique().to_pylist():
            if (meeting := met(stack, "qk", extracted.files(stack, "qk", False).width)) is not None:
                yield _compositions(extracted, stack, pairs.filter(pc.field("stack") == stack), meeting[0], device)


def _compositions(extracted: ExtractedModel, stack: str, pairs: pa.Table, tables: TokenProducts, device: str) -> pa.Table:
    """The strongest K-compositions of a stack, in the coordinates in which they were measured."""
    fold = extracted.folds(stack, "qk") and extracted.folds(stack, "ov")
    ov, qk = (extracted.files(stack, circuit, fold) for circuit in ("ov", "qk"))
    forms = composed("k", single(ov, pairs, "a", device), single(qk, pairs, "b", device))
    places = {name: pairs[f"{name}_b"].to_numpy() for name in ("layer", "head")}
    places |= {f"{name}_a": pairs[f"{name}_a"].to_numpy() for name in ("layer", "head")}
    return _table(stack, "k", places, between_tokens(forms, tables), fold)


def _table(stack: str, path: str, places: Mapping[str, np.ndarray], found: Eigenvalues, folded: bool) -> pa.Table:
    numbers: dict[str, Tensor] = {name: getattr(found, name) for name in COPYING}
    count = len(found.copying)
    columns = {
        **{name: pa.nulls(count, pa.int32()) for name in ("layer_a", "head_a")},
        **places,
        **{name: values.numpy() for name, values in numbers.items()},
        "folded": np.full(count, folded),
    }
    return labelled(pa.table(columns), TOKEN_PATHS, stack=stack, path=path)
