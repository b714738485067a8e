"""Shell: the page without models. It is the same for every study, so no model that comes or goes makes it anew."""

from __future__ import annotations

from pathlib import Path

from headgram.report.page import page_shell
from headgram.results.files import write_text
from headgram.results.record import Provenance, seal


def write_shell(shell: Path, record: Path, provenance: Provenance) -> None:
    """Write the page without models."""
    write_text(shell, page_shell())
    seal(record, provenance, [shell])
