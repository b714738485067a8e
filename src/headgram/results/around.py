"""What stands around the projections of a model's layers, in one small file between extraction and measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
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
        If the file is damaged or has another key than the job was told.
    """
    check(record, key, [path])
    found: dict[str, dict[str, Any]] = torch.load(path, weights_only=True)
    return {
        name: Frames(**{**stack, "layers": {layer: _frame(each) for layer, each in stack["layers"].items()}})
        for name, stack in found.items()
    }


def _frame(values: Mapping[str, Any]) -> Frame:
    kinds = {"norm": Norm, "source_norm": Norm, "query_norm": Norm, "key_norm": Norm, "output_norm": Norm, "rotary": Rotary}
    read = {role: kinds[role](**value) for role, value in values.items() if role in kinds and value is not None}
    return Frame(**{**values, **read})


def around_of(form: str, frames: Frames) -> dict[str, Any]:
    """What the table `models` says of a stack: the kind of its norm, scale and bound of its scores, and what cannot be folded in.

    Numbers are medians over layers.
    """
    layers = list(frames.layers.values())
    norms = [layer.norm for layer in layers if layer.norm is not None]
    kind = "none" if not norms else "layer" if norms[-1].centred else "rms"
    scales, caps = ([value for layer in layers if (value := getattr(layer, name)) is not None] for name in ("scale", "cap"))
    return {
        "norm_kind": None if "norm" in frames.missing else kind,
        "score_scale": median(scales) if scales and form.startswith("qk") else None,
        "score_cap": median(caps) if caps and form.startswith("qk") else None,
        "not_folded": "; ".join(_not_folded(form, frames)),
    }


def _not_folded(form: str, frames: Frames) -> Iterator[str]:
    """What stands between a form with norms folded in and the model's scores, or what a head writes."""
    layers = list(frames.layers.values())

    def any_of(*roles: str) -> bool:
        return any(getattr(layer, role) is not None for layer in layers for role in roles)

    def divided(*roles: str) -> bool:
        return any(norm is not None and norm.divides for layer in layers for norm in (getattr(layer, role) for role in roles))

    yield from _left_out(frames.missing)
    yield from frames.scores if form.startswith("qk") else frames.writes
    if divided("norm", "source_norm"):
        yield "the norm divides each token by a number of its own"
    if any(layer.norm is not None and layer.norm.bias is not None for layer in layers):
        yield "the norm's bias adds terms that are linear in one token"
    if frames.latent:
        yield "latent vectors are divided by norms of their own"
    if not form.startswith("qk"):
        if divided("output_norm"):
            yield "a norm after attention divides what all heads write by a number of its own for each token"
        return
    if divided("query_norm", "key_norm"):
        yield "queries and keys are divided by norms of their own"
    own = [norm for layer in layers for norm in (layer.query_norm, layer.key_norm) if norm is not None]
    if any(norm.bias is not None for norm in own):
        yield "biases of these norms add terms that are linear in one token"
    if any_of("query_bias", "key_bias"):
        yield "biases of queries and keys add terms that are linear in one token"
    if any_of("cap"):
        yield "scores are bounded"


def _left_out(missing: Mapping[str, str]) -> Iterator[str]:
    """One clause for all roles that are left out for one reason."""
    reasons: dict[str, list[str]] = {}
    for role, sentence in missing.items():
        _, _, why = sentence.partition(f"has no role '{role}' to read: ")
        reasons.setdefault(why or sentence, []).append(role.replace("_", " "))
    for why, roles in reasons.items():
        yield f"{', '.join(roles)} cannot be read: {why}"
