"""Tiny models of known types."""

from __future__ import annotations

import json
from pathlib import Path

from headgram.proofs.listed import listed_models


def saved(model_type: str, folder: Path, number: int = 0) -> Path:
    """The type's tiny model of this number, on disk."""
    model = [model for model, _ in listed_models(model_type)][number]
    model.save_pretrained(folder)
    return folder


def reconfigured(folder: Path, **changes: object) -> Path:
    """The same checkpoint with changes to its config.json; None takes an entry away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder
