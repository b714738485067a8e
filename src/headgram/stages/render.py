"""Render: what the page shows of one model, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headgram.report.arrays import read_model
from headgram.report.figures import stack_figures
from headgram.report.pack import beside, layer_packs, model_pack
from headgram.results.files import write_text
from headgram.results.record import Provenance, check, seal


@dataclass(frozen=True)
class Rendered:
    """The files that a rendering writes.

    Attributes
    ----------
    data
        The script `{model}.js`; of models with many heads one per layer beside it, in a folder of the model's name.
    figures
        A folder: {figure}/{model}/{circuit}/{stack}.svg.
    """

    data: Path
    figures: Path
    record: Path


def render(model: str, tables: Mapping[str, Path], records: Sequence[Path], rendered: Rendered, provenance: Provenance) -> None:
    """Render one model, given its tables by name and the records that cover them.

    Raises
    ------
    HeadgramError
        If a table is damaged or has another key than the job was told.
    """
    for record, key in zip(records, provenance.recipe.upstream, strict=True):
        check(record, key, reads=tables.values())
    stacks = read_model(tables)
    texts = {rendered.data: beside(model, model_pack(stacks))}
    for name, layer in layer_packs(stacks).items():
        texts[rendered.data.with_suffix("") / f"{name}.js"] = beside(f"{model}/{name}", layer)
    for name, stack in stacks.items():
        for figure, drawn in stack_figures(model, name, stack).items():
            texts[rendered.figures / figure / model / f"{name}.svg"] = drawn
    for path, text in texts.items():
        write_text(path, text)
    seal(rendered.record, provenance, list(texts))
