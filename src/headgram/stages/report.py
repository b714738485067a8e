"""Report: the page and the figures of all models of the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headgram.artifacts import Provenance, check, seal, write_text
from headgram.report.arrays import StackSummary, read_model
from headgram.report.figures import profile_figures, stack_figures
from headgram.report.page import EMBEDDED, beside, index_pack, model_pack, page


@dataclass(frozen=True)
class Source:
    """What a report reads of one model: its tables by name, and the records that cover them."""

    model: str
    tables: Mapping[str, Path]
    records: Sequence[Path]


@dataclass(frozen=True)
class Report:
    """The files that a report writes."""

    page: Path
    data: Path  # a folder: one script per model
    figures: Path  # a folder: {figure}/{model}/{stack}.svg, and *.svg of all models
    record: Path


def write_report(sources: Sequence[Source], report: Report, provenance: Provenance) -> None:
    """Write the page, every model's data beside it, and the figures.

    Raises
    ------
    HeadgramError
        If a table is damaged or belongs to another run.
    """
    keys = iter(provenance.identity.upstream)
    for source in sources:
        for record in source.records:
            check(record, next(keys), reads=source.tables.values())

    summaries: dict[str, dict[str, StackSummary]] = {}
    packs: dict[str, str] = {}
    written: list[Path] = []
    for source in sources:
        stacks = read_model(source.tables)
        summaries[source.model] = {name: stack.summary for name, stack in stacks.items()}
        pack = model_pack(stacks)
        if sum(map(len, packs.values())) + len(pack) <= EMBEDDED:
            packs[source.model] = pack
        texts = {report.data / f"{source.model}.js": beside(source.model, pack)}
        for name, stack in stacks.items():
            drawn = stack_figures(source.model, name, stack)
            texts |= {report.figures / figure / source.model / f"{name}.svg": text for figure, text in drawn.items()}
        written += _write(texts)
    first = {model: next(iter(stacks.values())) for model, stacks in summaries.items()}
    written += _write({report.figures / f"{name}.svg": text for name, text in profile_figures(first).items()})
    written += _write({report.page: page(index_pack(summaries), packs)})
    _remove_others([report.data, report.figures], written)
    seal(report.record, provenance, written)


def _write(texts: Mapping[Path, str]) -> list[Path]:
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _remove_others(folders: Sequence[Path], written: Sequence[Path]) -> None:
    """Remove what earlier reports wrote of models that are no longer in the manifest."""
    for path in [path for folder in folders for path in folder.rglob("*") if path.is_file() and path not in written]:
        path.unlink()
