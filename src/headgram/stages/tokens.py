"""Tokens: those whose embedding projects most on what a head reads, or whose output row does on what it writes.

A direction that is read is one of what a norm hands on, and tokens enter before it. With `N(x) = γ * C x` but for a division,
`<N(x), v>` is `<x, C (γ * v)>`: where the norm is known, rows are projected on that. A direction that is written passes the last
norm, and rows of the unembedding are projected on `N(v) = γ * C v`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.vocabulary import token_texts
from headgram.errors import HeadgramError
from headgram.forms.reading import Norm
from headgram.forms.transforms import handed_on, read_through
from headgram.forms.variants import FOLDED, Variant
from headgram.geometry.nulls import Null
from headgram.geometry.projections import projections
from headgram.geometry.ratios import ratio
from headgram.geometry.token_space import TokenProducts, centred_gram
from headgram.results.paths import Place, between_streams
from headgram.results.record import Provenance, check, seal
from headgram.results.tables import TOKENS, labelled, write_table
from headgram.stages.extracted import ExtractedModel
from headgram.stages.token_paths import Met, token_paths

if TYPE_CHECKING:
    from headgram.checkpoints.token_tables import TokenTables
    from headgram.study.options import Config

#: Which table the left and the right side of a form meet: only what a head writes is read by the output.
TABLES = {"qk": ("embedding", "embedding"), "ov": ("unembedding", "embedding")}
#: Words in the names of stacks whose streams begin with something else than tokens.
_OTHERS = {"vision", "image", "pixel", "audio", "speech", "qformer", "pooling"}
#: Bytes of the directions that rows are projected on at once, and of a slice of rows, in float32.
_DIRECTION_BYTES, _SLICE_BYTES = 256 * 2**20, 64 * 2**20
#: Characters that are kept of a token.
_LONGEST = 200


@dataclass(frozen=True)
class Artifact:
    """A file that another stage has written, its record, and the key that this has."""

    path: Path
    record: Path
    key: str

    def checked(self) -> Path:
        """The file, whose content is what was written."""
        check(self.record, self.key, [self.path])
        return self.path


@dataclass(frozen=True)
class Written:
    """The files that this stage writes."""

    tokens: Path
    paths: Path
    record: Path


def find_tokens(
    directions: Artifact,
    channels: Artifact | None,
    extracted: ExtractedModel,
    written: Written,
    source: Mapping[str, Any],
    options: Config,
    provenance: Provenance,
) -> None:
    """Write the tables `tokens` and `token_paths`; without rows of what tokens neither enter nor leave.

    Parameters
    ----------
    directions
        Of the merge.
    channels
        The table of that name, where compositions were measured.
    extracted
        The extracted weights of all circuits and stacks, and what stands around them.
    source
        The arguments of `open_checkpoint`, as locked.
    options
        Sections `tokens` and `export` are read.

    Raises
    ------
    HeadgramError
        If the checkpoint cannot be opened, a tokenizer's file is damaged, or an artifact is damaged or has another key than the
        job was told.
    """
    provenance = replace(provenance, precision="float32")
    try:
        with open_checkpoint(**source) as checkpoint:
            texts = token_texts(checkpoint.location)
            if not texts:
                print("no tokenizer that headgram reads lies beside the weights: tokens have their numbers alone", flush=True)
            last = checkpoint.token_tables.final_norm()
            parts = [TOKENS.empty_table()]
            for circuit, stacks in torch.load(directions.checked(), mmap=True, weights_only=True).items():
                form = Variant.of(circuit)
                for stack, found in stacks.items():
                    before = {} if form.norm == FOLDED else extracted.norms(stack)
                    for side, table in zip(("left", "right"), TABLES[form.circuit], strict=True):
                        if why := unread(checkpoint.token_tables, table, stack, found[side].shape[-1]):
                            print(f"{circuit}, {stack}, {side}: without tokens: {why}", flush=True)
                            continue
                        for layers, part in _chunks(found, side):
                            if table == "unembedding":
                                met = handed_on(last, part)
                            else:
                                norms = [(before or {}).get(layer) for layer in layers.tolist()]
                                met = torch.stack(list(map(read_through, norms, part)))
                            slices = partial(checkpoint.token_tables.slices, table)
                            columns = _columns(layers, _unit(met), slices, texts, options.tokens.count, provenance.device)
                            known = before if table == "embedding" else last
                            parts.append(_table((circuit, stack), side, columns, known is not None))
            meeting = _meeting(checkpoint.token_tables, last, provenance.device)
            paths = list(token_paths(extracted, channels.checked() if channels else None, meeting, provenance.device))
    except HeadgramError as error:
        raise HeadgramError(f"model {provenance.model}: {error}") from None
    for path, tables in ((written.tokens, parts), (written.paths, paths)):
        write_table(path, [pa.concat_tables(tables)], provenance, options.export.compression)
    seal(written.record, provenance, [written.tokens, written.paths])


def _meeting(tables: TokenTables, last: Norm | None, device: str) -> Met:
    """What `token_paths` takes of the tables that heads meet, and whether the norm before the output is in it."""

    def slices(table: str, width: int) -> Iterator[torch.Tensor]:
        for rows in tables.slices(table, max(1, _SLICE_BYTES // (4 * width))):
            yield read_through(last if table == "unembedding" else None, rows.to(device))

    @cache
    def products(circuit: str, width: int) -> TokenProducts:
        if circuit == "qk":
            same = centred_gram(slices("embedding", width))
            return TokenProducts(same, same, same)
        pairs = zip(slices("unembedding", width), slices("embedding", width), strict=False)
        beside = (torch.cat([rows[: len(other)], other[: len(rows)]], 1) for rows, other in pairs)
        both = centred_gram(beside)  # of the tokens that both tables have
        return TokenProducts(both[:width, :width], both[width:, width:], both[width:, :width])

    def met(stack: str, circuit: str, width: int) -> tuple[TokenProducts, bool] | None:
        if any(unread(tables, table, stack, width) for table in TABLES[circuit]):
            return None
        return products(circuit, width), circuit == "qk" or last is not None

    return met


def _unit(directions: torch.Tensor) -> torch.Tensor:
    return ratio(directions, directions.norm(dim=-1, keepdim=True)).float()


def unread(tables: TokenTables, table: str, stack: str, width: int) -> str | None:
    """Why the rows of a table are not what a stack's directions read or write; None if they are."""
    if table in tables.missing:
        return tables.missing[table]
    if between_streams(stack) or _OTHERS & set(stack.split("_")):
        return "its stream holds no tokens as the model embeds them"
    if stack == "encoder" and "decoder" in tables.names[table].split("."):
        return f"{tables.names[table]} is the decoder's"
    if stack == "encoder" and table == "unembedding" and tables.names[table] != tables.names.get("embedding"):
        return f"{tables.names[table]} reads the decoder's stream"
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


def _table(place: Place, side: str, columns: Mapping[str, Any], of_stream: bool) -> pa.Table:
    values = {
        name: value.numpy() if isinstance(value, torch.Tensor) else pa.array(value, pa.string())
        for name, value in columns.items()
    }
    circuit, stack = place
    return labelled(pa.table(values), TOKENS, circuit=circuit, stack=stack, side=side, folded=of_stream)
