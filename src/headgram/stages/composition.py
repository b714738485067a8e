"""Composition: which heads of a model write what later heads read, and what flows through the strongest pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from headgram.forms.reading import Rotary
from headgram.geometry.blocks import in_fitting_blocks
from headgram.geometry.composition import (
    KINDS,
    Ends,
    acausal,
    channels,
    joined,
    reads,
    scores,
    times_chance,
    writes,
)
from headgram.geometry.eigenvalues import Eigenvalues
from headgram.geometry.nulls import Moments, deviations
from headgram.results.factors import FactorFiles
from headgram.results.files import written_whole
from headgram.results.record import Provenance, seal
from headgram.results.tables import CHANNELS, COMPOSITION, labelled, write_table
from headgram.stages.extracted import ExtractedModel, single
from headgram.stages.kernels import kernel_tables

if TYPE_CHECKING:
    from headgram.study.options import Config

#: Directions that are kept of each of the strongest pairs.
DIRECTIONS = 4

_PAIR = ("layer_a", "head_a", "layer_b", "head_b")


@dataclass(frozen=True)
class Composed:
    """The files that this stage writes."""

    composition: Path
    channels: Path
    kernels: Path
    directions: Path
    record: Path


@dataclass(frozen=True, eq=False)
class _Stream:
    """The heads of a stack that write, and those that read them in one kind of composition, in the same coordinates."""

    stack: str
    kind: str
    writer: str
    reading: FactorFiles
    writing: FactorFiles
    rotaries: Mapping[int, Rotary | None]  # of the readers' layers, where positions turn what is read

    @property
    def labels(self) -> dict[str, str]:
        return {"stack": self.stack, "kind": self.kind, "writer": self.writer}

    def seen(self, layers: torch.Tensor) -> torch.Tensor:
        """The writers' layers in the readers' numbers. All of an encoder are -1, for they come before the readers' first."""
        return layers if self.writer == self.stack else torch.full_like(layers, -1)


def compose(extracted: ExtractedModel, composed: Composed, options: Config, provenance: Provenance) -> None:
    """Measure all pairs of heads of every stack, the first in an earlier layer, and of an encoder with what reads it.

    Parameters
    ----------
    extracted
        The extracted weights of all layers, in both circuits, and what stands around them.
    options
        Sections `composition` and `export` are read.

    Raises
    ------
    HeadgramError
        If an artifact is damaged or has another key than the job was told.
    """
    in_fitting_blocks(provenance.device, partial(_compose, extracted, composed, options, provenance))


def _compose(extracted: ExtractedModel, composed: Composed, options: Config, provenance: Provenance, size: int) -> None:
    """The same, with blocks of heads of at most `size` bytes."""
    provenance = replace(provenance, precision="float32 where accurate")
    device, streams = provenance.device, list(_streams(extracted))

    @lru_cache(maxsize=1)  # all of them, where one block holds them: for every kind
    def written(writing: FactorFiles, block: int) -> Ends:
        return writes(writing.read(*writing.blocks(writing.layers, size)[block], device=device))

    strongest = dict.fromkeys(streams, COMPOSITION.empty_table())

    def tables() -> Iterator[pa.Table]:
        yield COMPOSITION.empty_table()
        for stream in streams:
            for part in _parts(stream, written, device, size):
                yield part
                strongest[stream] = _strongest([strongest[stream], part], options.composition.strongest)

    compression = options.export.compression
    write_table(composed.composition, tables(), provenance, compression)
    flows = {stream: _flows(stream, pairs, device) for stream, pairs in strongest.items()}
    shown = pa.concat_tables([CHANNELS.empty_table(), *(table for table, _ in flows.values())])
    write_table(composed.channels, [shown], provenance, compression)
    write_table(composed.kernels, kernel_tables(extracted, device, size), provenance, compression)
    directions = {
        stack: {stream.kind: flow for stream, (_, flow) in flows.items() if stream.stack == stack} for stack in extracted.stacks
    }
    with written_whole(composed.directions) as file:
        torch.save(directions, file)
    seal(composed.record, provenance, [composed.composition, composed.channels, composed.kernels, composed.directions])


def _streams(extracted: ExtractedModel) -> Iterator[_Stream]:
    for stack in extracted.stacks:
        for kind, circuit in KINDS.items():
            if (writer := extracted.writer(stack, kind)) is None:
                continue
            fold = extracted.folds(stack, circuit) and extracted.folds(writer, "ov")
            files = extracted.files(stack, circuit, fold), extracted.files(writer, "ov", fold)
            yield _Stream(stack, kind, writer, *files, extracted.rotaries(stack) if circuit == "qk" else {})


def _parts(stream: _Stream, written: Callable[[FactorFiles, int], Ends], device: str, size: int) -> Iterator[pa.Table]:
    """Block by block of readers, their rows of the table; a reader meets later writers too, to be held against them."""
    reading, writing = stream.reading, stream.writing
    blocks = writing.blocks(writing.layers, size)
    writer_layer, writer_head = (torch.cat(each) for each in zip(*map(_places, blocks), strict=True))
    seen = stream.seen(writer_layer)
    for block in reading.blocks(reading.layers, size):
        heads = reading.read(*block, device=device)
        layer, head = _places(block)
        readers = [reads(stream.kind, heads)]
        if stream.rotaries:
            of_layers = [(heads.take(layer == each), stream.rotaries[each]) for each in block[0]]
            readers.append(joined([reads(stream.kind, some, rotary) for some, rotary in of_layers]))
        both, met = joined(readers), []  # what is written is formed once for both
        for i in range(len(blocks)):
            writers = written(writing, i)
            met.append((scores(both, writers), writers.moments))
        score, *turned = torch.cat([each for each, _ in met], 1).cpu().split(len(heads))
        z = deviations(score.square(), readers[0].moments, _all_of([moments for _, moments in met]), reading.width)
        share, later = acausal(score, layer, seen)
        print(f"{stream.stack}, {stream.kind}: layers {block[0][0]}-{block[0][-1]} read what all others write", flush=True)
        b, a = (seen < layer[:, None]).nonzero().T
        columns = {
            **dict(zip(_PAIR, (writer_layer[a], writer_head[a], layer[b], head[b]), strict=True)),
            "score": score[b, a],
            "times_chance": times_chance(score[b, a], reading.width),
            "z": z[b, a],
            "acausal": share[b, a],
            "later": later[b],
            "averaged": turned[0][b, a] if turned else pa.nulls(len(a), pa.float32()),
            "folded": np.full(len(a), reading.is_folded),
        }
        yield _table(stream, columns, COMPOSITION)


def _all_of(parts: Sequence[Moments]) -> Moments:
    return Moments(torch.cat([part.trace for part in parts]), torch.cat([part.square for part in parts]))


def _places(block: tuple[Sequence[int], range]) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer and index of every head of a block."""
    layers, heads = torch.tensor(list(block[0])), torch.tensor(list(block[1]))
    return layers.repeat_interleave(len(heads)), heads.repeat(len(layers))


def _strongest(parts: Sequence[pa.Table], count: int) -> pa.Table:
    """The rows of the highest scores, highest first; equal ones in the order of the table."""
    table = pa.concat_tables(parts)
    order = np.argsort(-table["score"].to_numpy(), kind="stable")
    return table.take(pa.array(order[:count]))


def _flows(stream: _Stream, pairs: pa.Table, device: str) -> tuple[pa.Table, dict[str, Any]]:
    """What flows through some pairs: their rows of the table `channels`, and values and directions."""
    if not len(pairs):
        return CHANNELS.empty_table(), {}
    both = single(stream.writing, pairs, "a", device), single(stream.reading, pairs, "b", device)
    found = channels(stream.kind, *both, DIRECTIONS, within=stream.writer == stream.stack)
    columns = {
        **{name: pairs[name] for name in (*_PAIR, "score")},
        "place": torch.arange(len(pairs)),
        "first": found.first.cpu(),
        "effective_rank": found.effective_rank.cpu(),
        **{name: _scores(found.eigenvalues, name, len(pairs)) for name in ("copying", "positive", "departure")},
    }
    kept = {name: getattr(found, name).float().cpu() for name in ("right", "left", "carried")}
    values = {"singular_values": found.singular_values.cpu()}
    values |= {"eigenvalues": found.eigenvalues.values} if found.eigenvalues else {}
    places = torch.tensor([pairs[name].to_pylist() for name in _PAIR]).T.contiguous()
    return _table(stream, columns, CHANNELS), {"writer": stream.writer, "pairs": places, **values, **kept}


def _scores(eigenvalues: Eigenvalues | None, name: str, count: int) -> Any:
    return getattr(eigenvalues, name) if eigenvalues else pa.nulls(count, pa.float64())


def _table(stream: _Stream, columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    values = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in columns.items()}
    return labelled(pa.table(values), schema, **stream.labels)
