"""Composition: which heads of a model write what later heads read, and what flows through the strongest pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from headgram.forms.heads import Heads
from headgram.geometry.composition import KINDS, Ends, acausal, channels, deviations, reads, scores, times_chance, writes
from headgram.geometry.ratios import ratio
from headgram.results.factors import FactorFiles
from headgram.results.files import written_whole
from headgram.results.record import Provenance, seal
from headgram.results.tables import CHANNELS, COMPOSITION, labelled, write_table

if TYPE_CHECKING:
    from headgram.study.options import Config

#: Directions that are kept of each of the strongest pairs.
DIRECTIONS = 4
#: Cross-attention takes its keys and values from another stream than the one that it writes to.
_KINDS_OF = {"cross": ("q",)}

_PAIR = ("layer_a", "head_a", "layer_b", "head_b")


@dataclass(frozen=True)
class Composed:
    """The files that this stage writes."""

    composition: Path
    channels: Path
    directions: Path
    record: Path


def compose(
    weights: Mapping[str, Mapping[str, Sequence[Path]]], composed: Composed, options: Config, provenance: Provenance
) -> None:
    """Measure all pairs of heads of every stack, the first in an earlier layer.

    Parameters
    ----------
    weights
        By stack and circuit, the extracted weights of all of its layers.
    options
        Sections `composition` and `export` are read.

    Raises
    ------
    HeadgramError
        If an artifact is damaged or belongs to another run.
    """
    provenance = replace(provenance, precision="float32 where accurate")
    keys = dict(zip(("qk", "ov"), provenance.identity.upstream, strict=True))
    sources = {
        stack: {circuit: FactorFiles(paths, keys[circuit], circuit) for circuit, paths in files.items()}
        for stack, files in weights.items()
    }
    found: dict[tuple[str, str], pa.Table] = {}  # by stack and kind, the strongest pairs

    def tables() -> Iterator[pa.Table]:
        for stack, files in sources.items():
            for kind in _KINDS_OF.get(stack, tuple(KINDS)):
                strongest = COMPOSITION.empty_table()
                for part in _parts(stack, kind, files, provenance.device):
                    yield part
                    strongest = _strongest([strongest, part], options.composition.strongest)
                found[stack, kind] = strongest

    compression = options.export.compression
    write_table(composed.composition, tables(), provenance, compression)
    flows = {place: _flows(*place, pairs, sources[place[0]], provenance.device) for place, pairs in found.items()}
    write_table(composed.channels, [pa.concat_tables([table for table, _ in flows.values()])], provenance, compression)
    directions = {stack: {kind: flow for (each, kind), (_, flow) in flows.items() if each == stack} for stack in sources}
    with written_whole(composed.directions) as file:
        torch.save(directions, file)
    seal(composed.record, provenance, [composed.composition, composed.channels, composed.directions])


def _parts(stack: str, kind: str, files: Mapping[str, FactorFiles], device: str) -> Iterator[pa.Table]:
    """Block by block of readers, their rows of the table; a reader meets later writers too, to be held against them."""
    reading, writing = files[KINDS[kind]], files["ov"]
    blocks = writing.blocks(writing.layers)
    writer_layer, writer_head = (torch.cat(each) for each in zip(*map(_places, blocks), strict=True))

    @lru_cache(maxsize=1)  # all of them, where one block holds them
    def written(block: int) -> Ends:
        return writes(writing.read(*blocks[block]).to(device))

    for block in reading.blocks(reading.layers):
        readers = reads(kind, reading.read(*block).to(device))
        layer, head = _places(block)
        met = [(scores(readers, ends), ends.purity) for ends in map(written, range(len(blocks)))]
        score, purity = (torch.cat(each, -1).cpu() for each in zip(*met, strict=True))
        z = deviations(score, readers.purity.cpu(), purity, reading.width)
        share, later = acausal(score, layer, writer_layer)
        print(f"{stack}, {kind}: layers {block[0][0]}-{block[0][-1]} read what all others write", flush=True)
        b, a = (writer_layer < layer[:, None]).nonzero().T
        columns = {
            **dict(zip(_PAIR, (writer_layer[a], writer_head[a], layer[b], head[b]), strict=True)),
            "score": score[b, a],
            "times_chance": times_chance(score[b, a], reading.width),
            "z": z[b, a],
            "acausal": share[b, a],
            "later": later[b],
        }
        yield _table(stack, kind, columns, COMPOSITION)


def _places(block: tuple[Sequence[int], range]) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer and index of every head of a block."""
    layers, heads = torch.tensor(list(block[0])), torch.tensor(list(block[1]))
    return layers.repeat_interleave(len(heads)), heads.repeat(len(layers))


def _strongest(parts: Sequence[pa.Table], count: int) -> pa.Table:
    """The rows of the highest scores, highest first; equal ones in the order of the table."""
    table = pa.concat_tables(parts)
    order = np.argsort(-table["score"].to_numpy(), kind="stable")
    return table.take(pa.array(order[:count]))


def _flows(
    stack: str, kind: str, pairs: pa.Table, files: Mapping[str, FactorFiles], device: str
) -> tuple[pa.Table, dict[str, Any]]:
    """What flows through some pairs: their rows of the table `channels`, and values and directions."""
    if not len(pairs):
        return CHANNELS.empty_table(), {}
    earlier, later = (
        list(zip(*(pairs[f"{name}_{side}"].to_pylist() for name in ("layer", "head")), strict=True)) for side in "ab"
    )
    forms_a, forms_b = (_heads(files[circuit], places, device) for circuit, places in (("ov", earlier), (KINDS[kind], later)))
    found = channels(kind, forms_a, forms_b, DIRECTIONS)
    spectrum, eigenvalues = found.spectrum, found.eigenvalues
    columns = {
        **{name: pairs[name] for name in (*_PAIR, "score")},
        "place": torch.arange(len(pairs)),
        "first": ratio(spectrum.spectral_norm.square(), spectrum.fro_sq).cpu(),
        "effective_rank": spectrum.effective_rank.cpu(),
        **{name: getattr(eigenvalues, name) for name in ("copying", "positive", "departure")},
    }
    kept = {name: getattr(spectrum, name).float().cpu() for name in ("right", "left")} | {"carried": found.carried.float().cpu()}
    values = {"singular_values": spectrum.singular_values.cpu(), "eigenvalues": eigenvalues.values}
    places = torch.tensor([[*a, *b] for a, b in zip(earlier, later, strict=True)])
    return _table(stack, kind, columns, CHANNELS), {"pairs": places, **values, **kept}


def _heads(source: FactorFiles, places: Sequence[tuple[int, int]], device: str) -> Heads:
    """Single heads, each given as layer and index."""
    each = [source.read([layer], range(head, head + 1)) for layer, head in places]
    order = torch.arange(len(each))
    return Heads(torch.cat([head.a for head in each]), torch.cat([head.b for head in each]), order, order).to(device)


def _table(stack: str, kind: str, columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    values = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in columns.items()}
    return labelled(pa.table(values), schema, stack=stack, kind=kind)
