"""headgram: the batch engine for the geometry of attention heads.

The names below are the public door. They are loaded on first use, so that reading the plan of a
run costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headgram.version import __version__ as __version__

if TYPE_CHECKING:
    from headgram import plot as plot
    from headgram.atlas.compare import compare as compare
    from headgram.atlas.reader import Atlas as Atlas
    from headgram.atlas.reader import open_atlas as open_atlas
    from headgram.checkpoints.checkpoint import Checkpoint as Checkpoint
    from headgram.checkpoints.stack import Stack as Stack
    from headgram.errors import HeadgramError as HeadgramError
    from headgram.geometry.spectra import Spectrum as Spectrum
    from headgram.proofs.adopt import open_checkpoint as open_checkpoint
    from headgram.run.project import SNAKEFILE as SNAKEFILE
    from headgram.tensors import gram as gram
    from headgram.tensors import spectrum as spectrum


_HOMES = {
    "Atlas": "headgram.atlas.reader",
    "compare": "headgram.atlas.compare",
    "open_atlas": "headgram.atlas.reader",
    "Checkpoint": "headgram.checkpoints.checkpoint",
    "Stack": "headgram.checkpoints.stack",
    "open_checkpoint": "headgram.proofs.adopt",
    "HeadgramError": "headgram.errors",
    "Spectrum": "headgram.geometry.spectra",
    "SNAKEFILE": "headgram.run.project",
    "spectrum": "headgram.tensors",
    "gram": "headgram.tensors",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  (a computed list of the names above)


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module("headgram.plot")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'headgram' has no attribute {name!r}")
