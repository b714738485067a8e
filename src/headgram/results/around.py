"""What stands around the projections of a model's layers, in one small file between extraction and measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from headgram.forms.reading import Frame, Frames, Norm, Rotary
from headgram.results.files import written_whole
from headgram.results.record import check


def write_around(path: Path, stacks: Mapping[str, Frames]) -> None:
    """Write the frames of every stack, by name."""
    with written_whole(path) as file:
        torch.save({name: asdict(found) for name, found in stacks.items()}, file)


def read_around(path: Path, record: Path, key: str) -> dict[str, Frames]:
    """The frames of every stack, by name.

    Raises
    ------
    HeadgramError
        If the file is damaged or belongs to another run.
    """
    check(record, key, [path])
    found: dict[str, dict[str, Any]] = torch.load(path, weights_only=True)
    return {
        name: Frames({layer: _frame(each) for layer, each in stack["layers"].items()}, stack["missing"], stack["context"])
        for name, stack in found.items()
    }


def _frame(values: Mapping[str, Any]) -> Frame:
    kinds = {"norm": Norm, "query_norm": Norm, "key_norm": Norm, "rotary": Rotary}
    read = {role: kinds[role](**value) for role, value in values.items() if role in kinds and value is not None}
    return Frame(**{**values, **read})
