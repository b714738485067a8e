"""Report: the page, and the figures of all models together. It draws none of a single model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headgram.report.arrays import StackSummary, read_summaries
from headgram.report.figures import profile_figures
from headgram.report.pack import beside, from_beside
from headgram.report.page import EMBEDDED, index_pack, page
from headgram.report.steps import steps_pack
from headgram.results.files import write_text
from headgram.results.record import Provenance, Record, check, record_of, seal


@dataclass(frozen=True)
class ReportedModel:
    """What a report reads of one model.

    Attributes
    ----------
    tables
        `models`, `layers` and `heads`; the last is read of models of a lineage alone.
    data
        The script that was rendered.
    merged, derived, rendered
        Records.
    """

    name: str
    tables: Mapping[str, Path]
    data: Path
    merged: Path
    derived: Path
    rendered: Path


@dataclass(frozen=True)
class Lineages:
    """Models whose numbers are drawn over their steps.

    Attributes
    ----------
    models
        The models of every lineage, in the order of their steps.
    drift, records
        By the later model and the earlier one, the table `drift` and its record, in the order of the report's inputs.
    """

    models: Mapping[str, Sequence[str]]
    drift: Mapping[tuple[str, str], Path]
    records: Mapping[tuple[str, str], Path]


@dataclass(frozen=True)
class ReportFiles:
    """The files that a report writes."""

    page: Path
    figures: Path  # a folder
    lineages: Path  # a folder: {number}.js
    record: Path


def write_report(
    shell: Path, models: Sequence[ReportedModel], lineages: Lineages, report: ReportFiles, provenance: Provenance
) -> None:
    """Write the page and the figures of all models; the record names the rendered models' records, too.

    Parameters
    ----------
    shell
        The page without models.

    Raises
    ------
    HeadgramError
        If a file that is read is damaged or has another key than the job was told.
    """
    keys = iter(provenance.recipe.upstream)
    check(record_of(shell), next(keys), reads=[shell])
    origins, summaries, packs = {}, {}, {}
    held = 0
    for model in models:
        derived = [model.tables[name] for name in ("models", "layers")]
        drawn = any(model.name in names for names in lineages.models.values())
        origins[model.name] = _origin(check(model.merged, next(keys), reads=[model.tables["heads"]] if drawn else ()))
        check(model.derived, next(keys), reads=derived)
        check(model.rendered, next(keys), reads=[model.data])
        summaries[model.name] = read_summaries(model.tables)
        text = from_beside(model.data.read_text(encoding="utf-8"))
        if held + len(text) <= EMBEDDED:
            packs[model.name] = text
            held += len(text)
    for pair, table in lineages.drift.items():
        check(lineages.records[pair], next(keys), reads=[table])
    first = {model: next(iter(stacks.values())) for model, stacks in summaries.items()}
    texts = {report.figures / f"{name}.svg": drawn for name, drawn in profile_figures(first).items()}
    for i, names in enumerate(lineages.models.values()):
        texts[report.lineages / f"{i}.js"] = beside(f"lineages/{i}", _steps(names, models, summaries, lineages))
    texts[report.page] = page(shell.read_text(encoding="utf-8"), index_pack(summaries, origins, lineages.models), packs)
    for path, text in texts.items():
        write_text(path, text)
    seal(report.record, provenance, [*texts, *(model.rendered for model in models)])


def _steps(
    names: Sequence[str],
    models: Sequence[ReportedModel],
    summaries: Mapping[str, Mapping[str, StackSummary]],
    lineages: Lineages,
) -> str:
    """What the page draws of one lineage, of the stacks that all of its models have."""
    places = [place for place in summaries[names[0]] if all(place in summaries[name] for name in names)]
    tables = {model.name: model.tables for model in models if model.name in names}
    drift = {pair: path for pair, path in lineages.drift.items() if set(pair) <= set(names)}
    return steps_pack(names, places, tables, drift)


def _origin(merged: Record) -> dict[str, str]:
    """Where a model is from, its revision and commit, which random twin it is, and when and by what version it was measured."""
    said = merged.model_extra or {}
    lock = said["lock"]
    known = {"source": lock["source"], "revision": lock["revision"], "commit": lock["commit"]}
    known |= {"twin": str(lock["overrides"].get("twin", ""))}
    known |= {"measured": said["started"][:10], "version": said["headgram"]}
    return {name: text for name, text in known.items() if text}
