"""Tokens: those whose embedding projects most on what a head reads, or whose output row does on what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
from headgram.results.paths import Place
from headgram.results.record import Provenance, check, seal
from headgram.results.tables import TOKENS, labelled, write_table

if TYPE_CHECKING:
    from headgram.checkpoints.embeddings import Embedding
    from headgram.study.options import Config

#: Sides of directions, and what tokens are to them: only what a head writes is read by the output.
_USES = {("qk", "right"): "input", ("qk", "left"): "input", ("ov", "right"): "input", ("ov", "left"): "output"}
#: Stacks whose streams hold no embeddings of tokens, or not those of the model's own ones.
_WITHOUT = ("vision", "cross")
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
    """Write the table `tokens`; without rows of stacks whose width no embedding has.

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
                    embeddings = checkpoint.embeddings(found["right"].shape[-1]) if stack not in _WITHOUT else {}
                    if not embeddings:
                        print(f"{circuit}, {stack}: no embedding of tokens has the width of this stream", flush=True)
                        continue
                    for side in ("right", "left"):
                        embedding = embeddings[_USES[Variant.of(circuit).circuit, side]]
                        for layers, part in _chunks(found, side):
                            columns = _columns(layers, part, embedding, texts, options.tokens.count, provenance.device)
                            parts.append(_table((circuit, stack), side, columns))
    except HeadgramError as error:
        raise HeadgramError(f"model {provenance.model}: {error}") from None
    write_table(written.table, [pa.concat_tables(parts)], provenance, options.export.compression)
    seal(written.record, provenance, [written.table])


def _chunks(found: Mapping[str, torch.Tensor], side: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Layers and their directions, as many as fit."""
    step = max(1, _DIRECTION_BYTES // (4 * found[side][0].numel()))
    for layers, part in zip(found["layers"].split(step), found[side].split(step), strict=True):
        yield layers.clone(), part.clone()


def _columns(
    layers: torch.Tensor, directions: torch.Tensor, embedding: Embedding, texts: Mapping[int, str], count: int, device: str
) -> dict[str, Any]:
    """The rows of some layers' directions (L, H, k, d): of every direction its ends, of every end its tokens."""
    _, heads, kept, width = directions.shape
    rows = max(1, _SLICE_BYTES // (4 * width))
    found = projections(directions.reshape(-1, width).to(device), (each.to(device) for each in embedding.slices(rows)), count)
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
