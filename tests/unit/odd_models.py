"""Tiny models in odd configurations, and how far what stands around their heads is from what is read of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headgram import open_checkpoint
from headgram.proofs.listed import listed_models
from headgram.proofs.prove import _residuals, quiet

WAVES = {"rope_theta": 10000.0}


def tiny(model_type: str, **changes: Any) -> Any:
    """The first tiny model of a type, with other switches."""
    with quiet():
        return next(listed_models(model_type, changes))


def residuals(model: Any, folder: Path, entry: Mapping[str, Any]) -> dict[str, float]:
    with quiet(), open_checkpoint(folder) as checkpoint:
        return _residuals(model, checkpoint, {"whole": False, "walked": False, **entry})[2]


def saved(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder
