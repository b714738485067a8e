"""ReportFiles: the page, and the figures of all models together. It draws none of a single model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headgram.report.arrays import read_summaries
from headgram.report.figures import profile_figures
from headgram.report.pack import from_beside
from headgram.report.page import EMBEDDED, index_pack, page, page_shell
from headgram.results.files import write_text
from headgram.results.record import Provenance, Record, check, seal


@dataclass(frozen=True)
class Source:
    """What a report reads of one model.

    Attributes
    ----------
    tables
        `models` and `layers`.
    data
        The script that was rendered.
    merged, derived, rendered
        Records.
    """

    model: str
    tables: Mapping[str, Path]
    data: Path
    merged: Path
    derived: Path
    rendered: Path


@dataclass(frozen=True)
class ReportFiles:
    """The files that a report writes."""

    page: Path
    figures: Path  # a folder
    record: Path


def write_report(sources: Sequence[Source], report: ReportFiles, provenance: Provenance) -> None:
    """Write the page and the figures of all models; the record names the rendered models' records, too.

    Raises
    ------
    HeadgramError
        If a file that is read is damaged or belongs to another run.
    """
    keys = iter(provenance.identity.upstream)
    origins, summaries, packs = {}, {}, {}
    held = 0
    for source in sources:
        origins[source.model] = _origin(check(source.merged, next(keys), reads=()))
        check(source.derived, next(keys), reads=source.tables.values())
        check(source.rendered, next(keys), reads=[source.data])
        summaries[source.model] = read_summaries(source.tables)
        text = from_beside(source.data.read_text(encoding="utf-8"))
        if held + len(text) <= EMBEDDED:
            packs[source.model] = text
            held += len(text)
    first = {model: next(iter(stacks.values())) for model, stacks in summaries.items()}
    texts = {report.figures / f"{name}.svg": drawn for name, drawn in profile_figures(first).items()}
    texts[report.page] = page(page_shell(), index_pack(summaries, origins), packs)
    for path, text in texts.items():
        write_text(path, text)
    seal(report.record, provenance, [*texts, *(source.rendered for source in sources)])


def _origin(merged: Record) -> dict[str, str]:
    """Where a model is from, its revision and commit, which random twin it is, and when and by what version it was measured."""
    said = merged.model_extra or {}
    lock = said["lock"]
    known = {"source": lock["source"], "revision": lock["revision"], "commit": lock["commit"]}
    known |= {"twin": str(lock["overrides"].get("twin", ""))}
    known |= {"measured": said["started"][:10], "version": said["headgram"]}
    return {name: text for name, text in known.items() if text}
