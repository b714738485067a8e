"""Two models without a common basis, in the space of the tokens that both have: which head of one is like which of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from headgram.checkpoints.checkpoint import Checkpoint
from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.vocabulary import common_tokens, token_texts
from headgram.errors import HeadgramError
from headgram.geometry.costs import BLOCK_BYTES
from headgram.geometry.inner import inner_products
from headgram.geometry.ratios import ratio
from headgram.geometry.token_space import TokenRows, moved, norms, row_products
from headgram.results.factors import FactorFiles
from headgram.results.paths import Place
from headgram.results.record import Provenance, seal
from headgram.results.tables import CHANGES, DRIFT, MATCHES, at_place, write_table
from headgram.stages.lineage import FactorsAndDirections, matched, open_sides
from headgram.stages.tokens import TABLES, unread

if TYPE_CHECKING:
    from headgram.study.options import Config

#: Bytes of a slice of a table, in float32.
_SLICE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class LockedSource:
    """A model's name, and the arguments of `open_checkpoint`, as locked."""

    model: str
    opening: Mapping[str, Any]


def write_pair(
    sides: Sequence[Mapping[Place, FactorsAndDirections]],
    sources: Sequence[LockedSource],
    tables: Mapping[str, Path],
    record: Path,
    options: Config,
    provenance: Provenance,
) -> None:
    """Compare two models in token space and write their tables: `matches`; `drift` and `changes` have no rows.

    Parameters
    ----------
    sides
        Of the earlier model and of the later one, by circuit and stack, the same ones of both.
    sources
        Where both are.

    Raises
    ------
    HeadgramError
        If a model has no embedding or no tokenizer that can be read, both have fewer than two tokens in common, or an artifact is
        damaged or has another key than the job was told.
    """
    old, new = open_sides(sides, provenance)
    with ExitStack() as opened:
        checkpoints = [opened.enter_context(_opened(source)) for source in sources]
        rows = _common_rows(checkpoints, [source.model for source in sources])
        parts = [MATCHES.empty_table()]
        for place, factors in new.items():
            before, after = old[place].factors, factors.factors
            if reason := _why_not(place, checkpoints, (before, after)):
                print(f"{place[0]}, {place[1]}: {reason}", flush=True)
                continue
            found, permuted = _cosines(place[0], before, after, rows, provenance.device)
            ours, theirs = ((each.layers, each.heads) for each in (after, before))
            parts.append(at_place(place, matched("stack", ours, theirs, found, permuted.abs().amax(1).double()), MATCHES))
    if len(parts) == 1:
        names = " and ".join(source.model for source in sources)
        raise HeadgramError(
            f"models {names} have no stack in common that reads embeddings of tokens: take one out of its lineage"
        )
    written = {"drift": [DRIFT.empty_table()], "changes": [CHANGES.empty_table()], "matches": [pa.concat_tables(parts)]}
    provenance = replace(provenance, precision="float64")
    for name, path in tables.items():
        write_table(path, written[name], provenance, options.export.compression)
    seal(record, provenance, list(tables.values()))


def _opened(source: LockedSource) -> Checkpoint:
    try:
        return open_checkpoint(**source.opening)
    except HeadgramError as error:
        raise HeadgramError(f"model {source.model}: {error}") from None


def _common_rows(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> list[dict[str, TokenRows]]:
    """Of each model, by table, where the rows of the common tokens are."""
    texts = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        try:
            shapes = [checkpoint.token_tables.shape(table) for table in ("embedding", "unembedding")]
        except HeadgramError as error:
            raise HeadgramError(f"model {name}: {error}, so it is in no token space: take it out of its lineage") from None
        count = min(rows for rows, _ in shapes)
        texts.append({number: text for number, text in token_texts(checkpoint.location).items() if number < count})
        if not texts[-1]:
            raise HeadgramError(
                f"model {name}: no tokenizer that headgram reads lies beside its weights, so its tokens have no texts: "
                "put its tokenizer.json there, or take it out of its lineage"
            )
    common = common_tokens(*texts)
    if len(common) < 2:
        raise HeadgramError(
            f"models {' and '.join(names)} have {len(common)} tokens of the same text, so nothing to be compared in"
        )
    print(
        f"{len(common)} tokens have the same text in both models, of {' and '.join(str(len(each)) for each in texts)}", flush=True
    )
    return [
        {table: _rows_of(checkpoint, table, numbers) for table in ("embedding", "unembedding")}
        for checkpoint, numbers in zip(checkpoints, torch.tensor(common).T, strict=True)
    ]


def _rows_of(checkpoint: Checkpoint, table: str, numbers: Tensor) -> TokenRows:
    width = checkpoint.token_tables.shape(table)[1]
    return TokenRows(partial(checkpoint.token_tables.slices, table, max(1, _SLICE_BYTES // (4 * width))), numbers, width)


def _why_not(place: Place, checkpoints: Sequence[Checkpoint], factors: Sequence[FactorFiles]) -> str | None:
    """Why the heads of a stack meet no tokens in one of the models; None if they do."""
    circuit, stack = place
    sides = zip(checkpoints, factors, strict=True)
    reasons = (unread(each.token_tables, table, stack, files.width) for each, files in sides for table in TABLES[circuit])
    return next((reason for reason in reasons if reason), None)


def _cosines(
    circuit: str, old: FactorFiles, new: FactorFiles, rows: Sequence[Mapping[str, TokenRows]], device: str
) -> tuple[Tensor, Tensor]:
    """Of all heads of the later model with all of the earlier one; and the same with the tokens of the latter permuted."""
    before, after = ({table: side[table] for table in TABLES[circuit]} for side in rows)
    order = torch.randperm(len(after["embedding"].rows), generator=torch.Generator().manual_seed(0))

    def products(x: Mapping[str, TokenRows], y: Mapping[str, TokenRows]) -> list[Tensor]:
        made = {table: row_products(x[table], y[table]).to(device) for table in x}
        return [made[table] for table in TABLES[circuit]]

    crossed = [products(after, before), products(after, {table: each.reordered(order) for table, each in before.items()})]
    own, other = products(after, after), products(before, before)
    blocks = new.blocks(new.layers, BLOCK_BYTES["cpu"])
    sizes = [norms(new.read(*block, device=device), *own) for block in blocks]
    columns = []
    for block in old.blocks(old.layers, BLOCK_BYTES["cpu"]):
        heads = old.read(*block, device=device)
        size = norms(heads, *other)
        for there in [moved(heads, *pair) for pair in crossed]:
            grams = [inner_products(new.read(*each, device=device), there, "float64").gram for each in blocks]
            columns.append(ratio(ratio(torch.cat(grams), torch.cat(sizes)[:, None]), size).clamp(-1, 1).cpu())
    return torch.cat(columns[::2], 1), torch.cat(columns[1::2], 1)
