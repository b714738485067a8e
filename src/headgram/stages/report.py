"""Report: the page and the figures of all models of the manifest."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headgram.report.arrays import StackSummary, read_model
from headgram.report.figures import profile_figures, stack_figures
from headgram.report.page import EMBEDDED, beside, index_pack, layer_packs, model_pack, page, page_shell
from headgram.report.workers import workers
from headgram.results.files import write_text
from headgram.results.record import Provenance, Record, check, seal


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
    data: Path  # a folder: one script per model, and of models with many heads one per layer
    figures: Path  # a folder: {figure}/{model}/{circuit}/{stack}.svg, and *.svg of all models
    record: Path


def write_report(sources: Sequence[Source], report: Report, provenance: Provenance, processes: int = 1) -> None:
    """Write the page, every model's data beside it, and the figures; so many processes draw.

    Raises
    ------
    HeadgramError
        If a table is damaged or belongs to another run.
    """
    keys = iter(provenance.identity.upstream)
    origins = {}
    for source in sources:
        merged, *_ = (check(record, next(keys), reads=source.tables.values()) for record in source.records)
        origins[source.model] = _origin(merged)

    summaries: dict[str, dict[str, StackSummary]] = {}
    packs: dict[str, str] = {}
    written: list[Path] = []
    with workers(processes) as pool:
        shell = pool.submit(page_shell)
        models = deque(pool.submit(_write_model, source, report) for source in sources)
        for source in sources:
            summaries[source.model], pack, files = models.popleft().result()
            written += files
            if sum(map(len, packs.values())) + len(pack) <= EMBEDDED:
                packs[source.model] = pack
        first = {model: next(iter(stacks.values())) for model, stacks in summaries.items()}
        profiles = pool.submit(profile_figures, first).result()
        text = page(shell.result(), index_pack(summaries, origins), packs)
    written += _write({report.figures / f"{name}.svg": text for name, text in profiles.items()})
    written += _write({report.page: text})
    seal(report.record, provenance, written)


def _origin(merged: Record) -> dict[str, str]:
    """Where a model is from, its revision and commit, and when and by what version it was measured."""
    said = merged.model_extra or {}
    lock = said["lock"]
    known = {"source": lock["source"], "revision": lock["revision"], "commit": lock["commit"]}
    known |= {"measured": said["started"][:10], "version": said["headgram"]}
    return {name: text for name, text in known.items() if text}


def _write_model(source: Source, report: Report) -> tuple[dict[str, StackSummary], str, list[Path]]:
    """Write what the report holds of one model; its summaries by circuit and stack, its pack, and the files."""
    stacks = read_model(source.tables)
    pack = model_pack(stacks)
    texts = {report.data / f"{source.model}.js": beside(source.model, pack)}
    for name, layer in layer_packs(stacks).items():
        texts[report.data / source.model / f"{name}.js"] = beside(f"{source.model}/{name}", layer)
    for name, stack in stacks.items():
        drawn = stack_figures(source.model, name, stack)
        texts |= {report.figures / figure / source.model / f"{name}.svg": text for figure, text in drawn.items()}
    return {name: stack.summary for name, stack in stacks.items()}, pack, _write(texts)


def _write(texts: Mapping[Path, str]) -> list[Path]:
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)
