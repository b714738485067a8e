"""From rows of the manifest to entries of the lock: checkpoints are opened, and what they hold is pinned. Nothing is written.

That takes no torch for known types of models, if their weights are neither quantised nor in slices of parallel training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import ValidationError

from headgram.checkpoints.around import check_biases
from headgram.checkpoints.checkpoint import Checkpoint
from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.stack import Stack
from headgram.errors import MANIFEST, HeadgramError
from headgram.families.around import AROUND
from headgram.foreign import first_problem
from headgram.forms.circuits import CIRCUITS
from headgram.proofs.adopt import open_or_derive
from headgram.results.record import canonical, digest
from headgram.study.lock import (
    LockedAround,
    LockedCircuit,
    LockedModel,
    LockedStack,
    changed_message,
    locked_file,
)
from headgram.study.manifest import Row


def resolve_all(
    rows: Iterable[Row], progress: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, LockedModel], list[str]]:
    """Resolve rows; returns the entries by name, and a sentence about every row that cannot be resolved."""
    models: dict[str, LockedModel] = {}
    problems = []
    for row in rows:
        try:
            entry = models[row.name] = resolve(row)
            how = ", derived: the layout that is proven for its unknown type" if entry.derived else ""
            progress(f"resolved {row.name}: {entry.architecture}{how}, fingerprint {entry.fingerprint[:12]}")
        except (HeadgramError, OSError) as error:
            problems.append(f"line {row.line} ({row.name}): {error}")
        except ValidationError as error:  # no lock could hold that
            problems.append(f"line {row.line} ({row.name}): {row.source} holds what no model has ({first_problem(error)})")
    return models, problems


def unlike_its_lock(name: str, entry: LockedModel, manifest: Path = MANIFEST) -> list[str]:
    """A sentence if the bytes of any layer's factors are not what was locked; else nothing."""
    try:
        with open_checkpoint(**entry.how_to_open()) as checkpoint:
            for stack in entry.stacks:
                for circuit, factors in stack.circuits.items():
                    for layer, locked in zip(stack.layers, factors.digests, strict=True):
                        if not checkpoint.holds(stack.name, layer, locked, CIRCUITS[circuit].roles):
                            return [changed_message(name, f"stack '{stack.name}', layer {layer} of {entry.source}", manifest)]
                for layer, locked in zip(stack.layers, stack.around.digests if stack.around else (), strict=False):
                    if not checkpoint.holds(stack.name, layer, locked, AROUND):
                        what = f"a norm or a bias of stack '{stack.name}', layer {layer} of {entry.source}"
                        return [changed_message(name, what, manifest)]
    except HeadgramError as error:
        return [f"{name}: {error}"]
    return []


def resolve(row: Row) -> LockedModel:
    """Open a row's checkpoint and pin what it holds; reads the bytes of its heads' factors, or none of them at the hub.

    Raises
    ------
    HeadgramError
        If the checkpoint cannot be opened.
    """
    checkpoint, derived, family = open_or_derive(row.source, row.revision, row.overrides)
    with checkpoint:
        stacks = tuple(_locked_stack(checkpoint, stack) for stack in checkpoint.stacks)
        location = checkpoint.location
        files = tuple(locked_file(location, name) for name in (*location.weights, *location.described_by))
        content = {
            "architecture": checkpoint.architecture,
            "overrides": row.overrides,
            "stacks": [stack.model_dump(mode="json", exclude={"around"}) for stack in stacks],
        }
        return LockedModel(
            source=row.source,
            revision=row.revision,
            overrides=row.overrides,
            commit=location.commit,
            base=location.base,
            format=location.format,
            architecture=checkpoint.architecture,
            derived=derived,
            family=family,
            files=files,
            stacks=stacks,
            fingerprint=digest(canonical(content)),
        )


def _locked_stack(checkpoint: Checkpoint, stack: Stack) -> LockedStack:
    missing = {name: reason for name in CIRCUITS if (reason := _why_not(stack, name))}
    circuits = {
        name: LockedCircuit(
            rank=stack.rank if name == "qk" else stack.value_rank,
            dtype=stack.stored_as(circuit.roles),
            bytes=stack.nbytes(circuit.roles),
            digests=tuple(checkpoint.digest(stack.name, layer, circuit.roles) for layer in stack.layers),
        )
        for name, circuit in CIRCUITS.items()
        if name not in missing
    }
    shape = {name: getattr(stack, name) for name in ("name", "layers", "heads", "kv_heads", "hidden")}
    return LockedStack(**shape, circuits=circuits, missing=missing, around=_locked_around(checkpoint, stack))


def _locked_around(checkpoint: Checkpoint, stack: Stack) -> LockedAround:
    missing: dict[str, str] = {}
    layers = [checkpoint.around(stack.name, layer) for layer in stack.layers]
    for role in AROUND:
        try:
            for layer in layers:
                layer.check(role)
            check_biases(role, layers)
        except HeadgramError as error:
            missing[role] = str(error)
    turns = "rotary" not in missing and any(layer.turns for layer in layers)
    digests = tuple(checkpoint.digest(stack.name, layer, AROUND) for layer in stack.layers)
    return LockedAround(digests=digests, turns=turns, missing=missing)


def _why_not(stack: Stack, circuit: str) -> str | None:
    """Why a circuit of a stack cannot be measured, or None."""
    reasons = [stack.missing[role] for role in CIRCUITS[circuit].roles if role in stack.missing]
    if not reasons and circuit == "ov" and stack.output_width != stack.hidden:
        reasons = [f"its heads read a stream of width {stack.hidden} and write to one of width {stack.output_width}"]
    return reasons[0] if reasons else None
