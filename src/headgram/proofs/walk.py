"""Attention explained by tensors: a tiny model is built, saved and run, and every tensor on disk is tried for what an attention
module hands to its two products.

Names are never asked what they mean: the tensor that gives the queries is the query's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from headgram.checkpoints.wrappers import plain_name
from headgram.errors import HeadgramError
from headgram.families.layouts import LAYOUTS, QK, Dimensions, Factors
from headgram.proofs.calls import Call
from headgram.proofs.inputs import attention_only, every_call
from headgram.proofs.listed import saved
from headgram.proofs.neutral import neutralise
from headgram.proofs.products import relative_to_multiple
from headgram.proofs.shrink import tiny_model

_TOLERANCE = 1e-5
#: The counts of a stack that its configuration may state.
COUNTS = ("heads", "kv_heads", "rank", "hidden", "value_rank", "output_width")
#: Layouts whose parts can be found by trying tensors; each part reads one tensor, and needs no further sizes.
_TRIED = ("separate", "gated", "key_value_blocks", "blocks", "interleaved", "quarters", "column_blocks")


def names_on_disk(model: Any) -> list[str]:
    """The names of a model's tensors as transformers saves them, and as a checkpoint is read: without wrapping modules."""
    with saved(model) as folder:
        names: list[str] = []
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                names += map(plain_name, file.keys())
        return names


@dataclass(frozen=True)
class Found:
    """One attention module that was explained: its tensors on disk, and the counts that they imply."""

    module: str
    layout: str
    names: Mapping[str, str]  # what the layout reads -> name on disk
    counts: Mapping[str, int]  # by the names of COUNTS
    section: str  # the path of the module's configuration
    kind: str  # "self" or "cross"
    notes: tuple[str, ...]  # what lies between values and outputs
    placed: bool  # whether places were added to what queries and keys read; not every run of a model is given any


@dataclass(frozen=True)
class Sighting:
    """What one tiny model showed."""

    config: Any
    found: tuple[Found, ...]
    problems: tuple[str, ...]


def look_at(model_type: str, model_class: type, number: int) -> Sighting:
    """Save the `number`th tiny model of a type, run it, and explain each of its attention modules by tensors on disk."""
    model: Any = tiny_model(model_type, model_class, number)
    with saved(model) as folder:
        every = [item for path in sorted(folder.glob("*.safetensors")) for item in load_file(path).items()]
        stored = {plain_name(name): tensor.double() for name, tensor in every if tensor.dim() == 2}
    model.double()
    calls, _ = every_call(model)
    neutralise(model, {call.module for call in calls})
    calls, idle = every_call(model)
    problems = [f"{path} could not be run" for path in idle]
    found = []
    sections = dict(_sections(model.config))
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    once = {call.module: call for call in reversed(attention_only(model, calls))}
    for call in sorted(once.values(), key=lambda call: order[call.module]):
        try:
            found.append(_explain(call, stored, _section(model, call.module, sections)))
        except HeadgramError as error:
            problems.append(f"{call.module}: {error}")
    return Sighting(model.config, tuple(found), tuple(problems))


def _sections(config: Any, path: str = "") -> Iterator[tuple[int, str]]:
    yield id(config), path
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            yield from _sections(inner, f"{path}.{name}".lstrip("."))


def _section(model: nn.Module, path: str, sections: Mapping[int, str]) -> str:
    """The path of the configuration that a module, or the nearest one around it, was made with."""
    while True:
        config = getattr(model.get_submodule(path), "config", None)
        if id(config) in sections:
            return sections[id(config)]
        if not path:
            return ""
        path = path.rpartition(".")[0]


def _explain(call: Call, stored: Mapping[str, Tensor], section: str) -> Found:
    """The tensors that give what an attention module computes.

    Raises
    ------
    HeadgramError
        Says which role no tensor gives.
    """
    heads = len(call.query)
    reading = call.reading
    if reading is None or reading.given is None or reading.project is None:
        return _explain_scores(call, stored, section, "hands its heads to no output projection")
    value_rank = reading.value.shape[-1]
    weight: Any = reading.project.weight
    width = next((side for side in weight.shape[::-1] if side != heads * value_rank), heads * value_rank)
    for layout in _TRIED:
        for dims in _possible(call, value_rank, width):
            try:
                names, missing = _fits(layout, dims, call, stored)
            except HeadgramError:
                continue
            if not missing:
                notes = call.between | ({"sink"} if reading.has_sink else set())
                return _found(call, layout, names, dims, section, tuple(sorted(notes)))
    return _explain_scores(call, stored, section, f"no tensor gives its {_worst(call, stored, width)}")


def _possible(call: Call, value_rank: int, width: int) -> list[Dimensions]:
    """What the sizes of an attention module may be: with a key head for each head, or with fewer, which heads share evenly."""
    heads, _, rank = call.query.shape
    shared = [count for count in range(heads, 0, -1) if heads % count == 0]
    return [Dimensions(heads, count, rank, call.x.shape[-1], value_rank, width) for count in shared]


def _found(call: Call, layout: str, names: Mapping[str, str], dims: Dimensions, section: str, notes: tuple[str, ...]) -> Found:
    counts = {what: getattr(dims, what) for what in COUNTS}
    kind = "self" if call.one_stream else "cross"
    return Found(call.module, layout, names, counts, section, kind, notes, call.placed)


def _explain_scores(call: Call, stored: Mapping[str, Tensor], section: str, problem: str) -> Found:
    """The tensors that give queries and keys alone, where what heads write cannot be explained.

    Raises
    ------
    HeadgramError
        With the problem, if there are none.
    """
    for dims in _possible(call, call.query.shape[-1], call.x.shape[-1]):
        with suppress(HeadgramError):
            names, _ = _fits("separate", dims, call, stored)
            if set(names) >= set(QK):
                return _found(call, "separate", {role: names[role] for role in QK}, dims, section, ("writes",))
    raise HeadgramError(problem)


def _worst(call: Call, stored: Mapping[str, Tensor], width: int) -> str:
    """The first role that no tensor gives by itself, for a message."""
    for dims in _possible(call, call.query.shape[-1], width):
        lacking = [
            part.gives[0]
            for part in LAYOUTS["separate"]
            if not any(
                _given(part, dims, {part.reads[0]: one}, call)
                for one in stored.values()
                if part.shapes(dims)[part.reads[0]] == tuple(one.shape)
            )
        ]
        if "key" not in lacking:
            break
    return ", ".join(lacking) or "roles in one layout"


def _fits(layout: str, dims: Dimensions, call: Call, stored: Mapping[str, Tensor]) -> tuple[dict[str, str], str]:
    """What the layout reads -> the name of the tensor that gives it; and the roles of the first part that none gives."""
    names: dict[str, str] = {}
    for part in LAYOUTS[layout]:
        shapes = part.shapes(dims)
        (read,) = part.reads
        source = {"key": call.y, "value": call.z}.get(part.gives[0], call.x)
        if source.shape[-1] != dims.hidden:
            return names, "key, because keys read another width than queries"
        fitting = [name for name, tensor in stored.items() if tuple(tensor.shape) == shapes[read]]
        name = next((name for name in fitting if _given(part, dims, {read: stored[name]}, call)), None)
        if name is None:
            return names, ", ".join(part.gives)
        names[read] = name
    return names, ""


def _given(part: Any, dims: Dimensions, tensors: Factors, call: Call) -> bool:
    factors = part.split(dims, **tensors)
    return all(_gives(role, factor, call) for role, factor in factors.items())


def _gives(role: str, factor: Float[Tensor, "heads rank width"], call: Call) -> bool:
    reading = call.reading
    if role in ("query", "key"):
        x, theirs = (call.x, call.query) if role == "query" else (call.y, call.key)
    elif reading is None or reading.given is None:
        return False
    elif role == "output":
        heads, value_rank = reading.value.shape[0], reading.value.shape[-1]
        if factor.shape[:2] != (heads, value_rank):
            return False
        return _same(reading.side_by_side, reading.given) and _same(reading.heads @ factor, reading.written(reading.heads))
    else:
        x, theirs = call.z, reading.value
    if factor.shape[-1] != x.shape[-1]:
        return False
    ours = x @ factor.repeat_interleave(len(theirs) // len(factor), 0).transpose(1, 2)
    return _same(ours, theirs)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two are equal up to one positive number."""
    return relative_to_multiple(ours, theirs) < _TOLERANCE
