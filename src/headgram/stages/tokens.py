"""Tokens: those whose embedding projects most on what a head reads, or whose output row does on what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from headgram.checkpoints.checkpoint import open_checkpoint
from headgram.checkpoints.vocabulary import token_texts
from headgram.errors import HeadgramError
from headgram.forms.variants import Variant
from headgram.geometry.nulls import Null
from headgram.geometry.projections import projections
from headgram.results.paths import Place, between_streams
from headgram.results.record import Provenance, check, seal
from headgram.results.tables import TOKENS, labelled, write_table

if TYPE_CHECKING:
    from headgram.checkpoints.token_tables import TokenTables
    from headgram.study.options import Config

#: Sides of directions, and what tokens are to them: only what a head writes is read by the output.
_USES = {
    ("qk", "right"): "embedding",
    ("qk", "left"): "embedding",
    ("ov", "right"): "embedding",
    ("ov", "left"): "unembedding",
}
#: Words in the names of stacks whose streams begin with something else than tokens.
_OTHERS = {"vision", "image", "pixel", "audio", "speech", "qformer", "pooling"}
#: Bytes of the directions that rows are projected on at once, and of a slice of rows, in float32.
_DIRECTION_BYTES, _SLICE_BYTES = 256 * 2**20, 64 * 2**20
#: Characters that are kept of a token.
_LONGEST = 200


@dataclass(frozen=True)
class Directions:
    """The directions of a model, and the record of the merge that wrote them."""

    directions: Path
    record: Path


@dataclass(frozen=True)
class Written:
    """The files that this stage writes."""

    table: Path
    record: Path


def find_tokens(merged: Directions, written: Written, source: Mapping[str, Any], options: Config, provenance: Provenance) -> None:
    """Write the table `tokens`; without rows of what tokens neither enter nor leave.

    Parameters
    ----------
    source
        The arguments of `open_checkpoint`, as locked.
    options
        Sections `tokens` and `export` are read.

    Raises
    ------
    HeadgramError
        If the checkpoint cannot be opened, a tokenizer's file is damaged, or an artifact is damaged or belongs to another run.
    """
    provenance = replace(provenance, precision="float32")
    check(merged.record, provenance.identity.upstream[0], [merged.directions])
    try:
        with open_checkpoint(**source) as checkpoint:
            texts = token_texts(checkpoint.location)
            if not texts:
                print("no tokenizer that headgram reads lies beside the weights: tokens have their numbers alone", flush=True)
            parts = [TOKENS.empty_table()]
            for circuit, stacks in torch.load(merged.directions, mmap=True, weights_only=True).items():
                for stack, found in stacks.items():
                    for side in ("right", "left"):
                        table = _USES[Variant.of(circuit).circuit, side]
                        if why := unread(checkpoint.token_tables, table, stack, found[side].shape[-1]):
                            print(f"{circuit}, {stack}, {side}: without tokens: {why}", flush=True)
                            continue
                        for layers, part in _chunks(found, side):
                            slices = partial(checkpoint.token_tables.slices, table)
                            columns = _columns(layers, part, slices, texts, options.tokens.count, provenance.device)
                            parts.append(_table((circuit, stack), side, columns))
    except HeadgramError as error:
        raise HeadgramError(f"model {provenance.model}: {error}") from None
    write_table(written.table, [pa.concat_tables(parts)], provenance, options.export.compression)
    seal(written.record, provenance, [written.table])


def unread(tables: TokenTables, table: str, stack: str, width: int) -> str | None:
    """Why the rows of a table are not what a stack's directions read or write; None if they are."""
    if table in tables.missing:
        return tables.missing[table]
    if between_streams(stack) or _OTHERS & set(stack.split("_")):
        return "its stream holds no tokens as the model embeds them"
    if stack == "encoder" and "decoder" in tables.names[table].split("."):
        return f"{tables.names[table]} is the decoder's"
    rows = tables.shape(table)[1]
    return None if rows == width else f"the rows of {tables.names[table]} have width {rows}, and its stream {width}"


def _chunks(found: Mapping[str, torch.Tensor], side: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Layers and their directions, as many as fit."""
    step = max(1, _DIRECTION_BYTES // (4 * found[side][0].numel()))
    for layers, part in zip(found["layers"].split(step), found[side].split(step), strict=True):
        yield layers.clone(), part.clone()


def _columns(
    layers: torch.Tensor,
    directions: torch.Tensor,
    slices: Callable[[int], Iterator[torch.Tensor]],
    texts: Mapping[int, str],
    count: int,
    device: str,
) -> dict[str, Any]:
    """The rows of some layers' directions (L, H, k, d): of every direction its ends, of every end its tokens."""
    _, heads, kept, width = directions.shape
    rows = max(1, _SLICE_BYTES // (4 * width))
    found = projections(directions.reshape(-1, width).to(device), (each.to(device) for each in slices(rows)), count)
    alive = (directions != 0).any(-1).flatten()[:, None, None].expand(found.rows.shape)
    place = dict(
        zip(("head_of_all", "end", "place"), torch.meshgrid(*map(torch.arange, found.rows.shape), indexing="ij"), strict=True)
    )
    of_head = place["head_of_all"][alive]
    token = found.rows[alive]
    return {
        "layer": layers[of_head // (heads * kept)],
        "head": of_head // kept % heads,
        "direction": of_head % kept,
        "sign": 1 - 2 * place["end"][alive],
        "place": place["place"][alive],
        "token": token,
        "text": [_kept(texts.get(number, "")) for number in token.tolist()],
        "value": found.values[alive],
        "deviations": found.deviations[alive],
        "chance": torch.full(token.shape, Null(0.0, 1.0).best_of(found.count)),
        "share": found.share[of_head],
    }


def _kept(text: str) -> str:
    """A stranger's text as a table can hold it."""
    return text[:_LONGEST].encode(errors="replace").decode()


def _table(place: Place, side: str, columns: Mapping[str, Any]) -> pa.Table:
    values = {
        name: value.numpy() if isinstance(value, torch.Tensor) else pa.array(value, pa.string())
        for name, value in columns.items()
    }
    circuit, stack = place
    return labelled(pa.table(values), TOKENS, circuit=circuit, stack=stack, side=side)
