"""Proofs that the registry is right: headgram's weights against what the models themselves compute.

For a model type, transformers builds a tiny random model and saves it; headgram opens the saved file. Then the model runs, and
the product of queries and keys is caught in every attention module. With all positions equal, rotary encodings cancel, so that
`q_t · k_s = x_s^T g x_t` for every head and every pair of tokens, where `x` is what the attention module receives. All pairs
are compared, not only `t = s`: a layout that takes keys for queries transposes `g`, which no `x_t^T g x_t` can see.

Values and outputs are proven by what each head writes: with the attention weights `p` that the model computes, `W_O[h] Σ_t p_t
W_V[h] y_t` is what the model's own output projection makes of that head alone.

What the forms leave out is neutralised in the running model, never in the saved file: biases are set to zero, and norms between
projection and score pass their input on (those inside latent attention keep their gain), and gates are open. What of it lies
between values and outputs must be in a remark of the family's data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headgram.checkpoints.checkpoint import Checkpoint
from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.stack import Stack
from headgram.errors import HeadgramError
from headgram.families.around import AROUND, TABLES
from headgram.families.layouts import ROLES
from headgram.families.registry import Family, adopting, families, family_of, final_norm
from headgram.proofs.around import (
    Matched,
    around_residuals,
    final_norm_residual,
    forms_of,
    table_residuals,
    without_epsilon,
)
from headgram.proofs.calls import Call
from headgram.proofs.inputs import attention_only, every_call, inputs_of
from headgram.proofs.listed import NO_FLAGS, listed_models, saved
from headgram.proofs.neutral import neutralise
from headgram.proofs.probe import scores_of
from headgram.proofs.products import relative, relative_to_multiple
from headgram.proofs.shrink import quiet, walked_models

#: The columns of a table of proofs, and what `Proof.cells` holds.
COLUMNS = ("model type", "family", "layout", "stacks", "heads/key heads×rank", "roles", "around them", "residual", "ok")
#: A right layout agrees to float32 rounding (some models compute scores in float32); a wrong one is off by about 1.
TOLERANCE = 1e-5
#: A type has six tiny models: three shapes, each with two classes. If further towers must run, each shape is tried with one class
#: alone, and the models in these places are left out.
_SKIPPED = (1, 2, 5)


@dataclass(frozen=True)
class Proof:
    """What was tried for one model type, and how it ended.

    Attributes
    ----------
    layouts, stacks
        Those that were met in the saved checkpoints.
    shapes
        `H/K×r` of every stack that was compared.
    roles
        Those that were compared in every stack.
    missing
        Why other roles cannot be read.
    residual
        The largest difference between a score of the model, or what a head writes, and headgram's, relative to the largest.
    problem
        None if everything agrees; otherwise the first thing that does not.
    """

    model_type: str
    family: str
    layouts: tuple[str, ...]
    stacks: tuple[str, ...]
    shapes: tuple[str, ...]
    roles: tuple[str, ...]
    missing: tuple[str, ...]
    residual: float
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether everything that was compared agreed."""
        return self.problem is None

    @property
    def cells(self) -> tuple[str, ...]:
        """The proof as a row of a table with the columns `COLUMNS`."""
        roles = [role for role in self.roles if role in ROLES]
        lists = (", ".join(values) for values in (self.layouts, self.stacks, self.shapes, roles))
        lacking = [role for role in AROUND if role not in self.roles]
        around = "none" if len(lacking) == len(AROUND) else f"all but {', '.join(lacking)}" if lacking else "all"
        return (self.model_type, self.family, *lists, around, f"{self.residual:.0e}", "yes" if self.ok else "no")


def known_types(walked: bool = True) -> list[str]:
    """Every model type of the registry, in order; with or without those whose data the walk has written.

    Not those that are towers of other models alone, with which they are proven.
    """
    return sorted(name for family in families() if family.alone and (walked or not family.walked) for name in family.model_types)


def prove(model_type: str, flags: Mapping[str, bool] = NO_FLAGS) -> Proof:
    """Prove one model type: every shape in `tiny_models.toml`, as base model and with a head on top.

    `flags` are switches of its configuration that the tiny models should have too: they may change the layout.

    Raises
    ------
    HeadgramError
        If the registry does not know the type, or transformers is not installed.
    """
    _need_transformers()
    family = family_of(model_type)
    found: list[Stack] = []
    scores = writes = 0.0
    around: dict[str, float] = {}
    problem = None
    try:
        with quiet():
            models = walked_models(model_type) if family.walked else listed_models(model_type, flags)
            for place, (model, tiny) in enumerate(models):
                if family.towers and family.text and place in _SKIPPED:
                    continue
                entry = {**tiny, "walked": family.walked, "whole": family.walked or bool(family.towers)}
                with saved(model) as folder, open_checkpoint(folder) as checkpoint:
                    if family.walked and checkpoint.architecture != model_type:
                        raise HeadgramError(f"transformers saves it as '{checkpoint.architecture}'")
                    found += checkpoint.stacks
                    residuals = _residuals(model, checkpoint, entry)
                    scores, writes = max(scores, residuals[0]), max(writes, residuals[1])
                    around |= {role: max(around.get(role, 0.0), residual) for role, residual in residuals[2].items()}
    except Exception as error:  # whatever transformers raises, the other types should still be proven
        problem = str(error) if isinstance(error, HeadgramError) else f"{type(error).__name__}: {error}"
    if problem is None and not found:
        problem = "transformers has no model of this type alone"
    if problem is None and not scores <= TOLERANCE:
        problem = f"the scores differ by {scores:.1e} of the largest"
    if problem is None and not writes <= TOLERANCE:
        problem = f"what the heads write differs by {writes:.1e} of the largest"
    for role in [role for role, residual in around.items() if problem is None and not residual <= TOLERANCE]:
        problem = f"what follows from the role '{role}' differs by {around[role]:.1e} of the largest"
    return Proof(
        model_type,
        family.name,
        layouts=_each(stack._around.layout for stack in found),
        stacks=_each(stack.name for stack in found),
        shapes=_each(f"{stack.heads}/{stack.kv_heads}×{stack.rank}" for stack in found),
        roles=tuple(role for role in ROLES + AROUND if found and not any(role in stack.missing for stack in found))
        + tuple(role for role in TABLES if role in around),
        missing=_each(f"{role} of {stack.name}: {why}" for stack in found for role, why in stack.missing.items()),
        residual=max(scores, writes, *around.values()),
        problem=problem,
    )


def _each(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def markdown(proofs: Iterable[Proof]) -> list[str]:
    """The lines of a table of proofs."""
    rows = (COLUMNS, ("---",) * len(COLUMNS), *(proof.cells for proof in proofs))
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def adopt(model_type: str, flags: Mapping[str, bool] = NO_FLAGS) -> list[Proof]:
    """Prove a type that the registry does not know as if it belonged to each family whose names and shapes fit.

    Fitting alone shows nothing, and neither does a single shape, in which a wrong split can look right: two must agree.

    Raises
    ------
    HeadgramError
        If transformers does not know the type either, cannot build a tiny model of it, or is not installed; code from a
        checkpoint is never run.
    """
    check_known_to_transformers(model_type)
    proofs = []
    for family in _openers(model_type, flags):
        with adopting(model_type, family):
            proof = prove(model_type, flags)
        if proof.ok and len(proof.shapes) == 1:
            proof = replace(proof, problem="only one shape could be tried")
        proofs.append(proof)
    return proofs


def check_known_to_transformers(model_type: str) -> None:
    """Refuse a type of which no tiny model can be built.

    Raises
    ------
    HeadgramError
        If transformers is not installed, or does not know it.
    """
    _need_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise HeadgramError(
            f"the installed transformers does not know the model type '{model_type}', so that nothing can be proven about it: "
            "describe its layout in src/headgram/families/, with a test that compares it with the model's own scores"
        )


def _need_transformers() -> None:
    if find_spec("transformers") is None:
        raise HeadgramError(
            "the proofs build their models with transformers, which is not installed: pip install 'headgram[prove]'"
        )


def _openers(model_type: str, flags: Mapping[str, bool]) -> list[Family]:
    """The families whose names and shapes fit the first tiny model of a type; first those that want attention in every layer."""
    found = []
    try:
        with quiet():
            model, _ = next(listed_models(model_type, flags))
    except Exception as error:  # whatever transformers raises
        reason = f"{type(error).__name__} {error!s:.200}".splitlines()[0].strip()
        raise HeadgramError(f"transformers cannot build a tiny '{model_type}', so that nothing can be proven: {reason}") from None
    with quiet(), saved(model) as folder:
        for family in (one for one in families() if not one.walked):
            if fits(model_type, family, folder):
                found.append(family)
    return sorted(found, key=lambda family: any(rule.sparse for rule in family.stacks))


def fits(model_type: str, family: Family, folder: Path) -> bool:
    """Whether a saved model of a type can be opened as one of a family. Some types are saved under another one's name."""
    with suppress(HeadgramError), adopting(model_type, family), open_checkpoint(folder) as checkpoint:
        return checkpoint.architecture == model_type
    return False


def _residuals(model: nn.Module, checkpoint: Checkpoint, entry: Mapping[str, Any]) -> tuple[float, float, dict[str, float]]:
    """The largest relative difference of any score, of what any head writes, and of what follows from every other role.

    Raises
    ------
    HeadgramError
        If a layer never ran, the model has attention that belongs to no stack, or no remark tells what lies between values and
        outputs or is added before queries and keys.
    """
    model.double()
    without_epsilon(model)
    others: dict[str, float] = {}
    family = family_of(checkpoint.architecture)
    if family.embedding and checkpoint.architecture in family.model_types:
        others |= table_residuals(model, checkpoint)
        if (norm := final_norm(family.final, checkpoint.architecture)) is not None:
            others |= final_norm_residual(model, checkpoint, norm, inputs_of(model, entry))
    free = {call.module: call for call in _calls(model, entry, placed=True)}
    neutralise(model, {*free, *(() if entry["walked"] else (call.module for call in _calls(model, entry)))})
    calls = [call for call in _calls(model, entry) if call.layer not in entry.get("left_out", [])]
    claimed: set[str] = set()
    scores = writes = 0.0
    for stack in checkpoint.stacks:
        matched = []
        for layer in stack.layers:
            weights = {role: weight.double() for role, weight in checkpoint.factors(stack.name, layer).items()}
            w_q, w_k = weights["query"], weights["key"]
            mine = [call for call in calls if call.may_be(layer) and call.module not in claimed and _fits(call, stack)]
            if not mine:
                raise HeadgramError(f"stack '{stack.name}', layer {layer}: the model runs no attention of this shape there")
            scale = stack.rank**-0.5 if entry.get("scaled", False) else 1.0
            found = {call.module: _difference(call, w_q * scale, w_k, entry["whole"]) for call in mine}
            best = min(found, key=lambda module: found[module])
            claimed.add(best)
            ours = [call for call in mine if call.module == best]
            scores = max(scores, *(_difference(call, w_q * scale, w_k, entry["whole"]) for call in ours))
            if any(call.placed for call in ours) and not {"query", "key"} & stack.notes.keys():
                raise HeadgramError(f"the model adds places to what queries and keys read at {best}, unremarked")
            if {"value", "output"} <= weights.keys():
                writes = max(writes, *(_written(call, stack, weights["value"], weights["output"]) for call in ours))
            matched.append(Matched(stack, checkpoint.around(stack.name, layer), w_q, w_k, free.get(best, ours[0]), ours[0]))
        for role, residual in around_residuals(matched).items():
            others[role] = max(others.get(role, 0.0), residual)
    if unclaimed := sorted({call.module for call in calls} - claimed):
        raise HeadgramError(f"the model's attention at {unclaimed[0]} belongs to no stack")
    return scores, writes, others


def _calls(model: nn.Module, entry: Mapping[str, Any], placed: bool = False) -> list[Call]:
    """What attention computes in a model: all of it if all towers are read, else what one forward runs.

    Tokens are all at one position, unless they are `placed`.

    Raises
    ------
    HeadgramError
        If a module that looks like attention cannot be run.
    """
    if not entry["whole"] or (placed and not entry["walked"]):
        inputs = inputs_of(model, entry)
        inputs = {name: x for name, x in inputs.items() if not placed or not name.endswith("position_ids")}
        return attention_only(model, scores_of(model, inputs, still=not placed))
    calls, idle = every_call(model)
    if idle:
        raise HeadgramError(f"the model's attention at {idle[0]} could not be run")
    return attention_only(model, calls)


def _fits(call: Call, stack: Stack) -> bool:
    return call.query.shape[::2] == (stack.heads, stack.rank) and call.x.shape[-1] == stack.hidden


def _difference(
    call: Call, w_q: Float[Tensor, "heads rank hidden"], w_k: Float[Tensor, "kv_heads rank hidden"], scaled: bool
) -> float:
    """How far the model's scores are from `x_s^T g x_t`, or from one multiple of all of them, relative to the largest of them."""
    if call.y.shape[-1] != w_k.shape[-1]:
        return math.inf
    ours, theirs = forms_of(call, w_q, w_k), call.query @ call.key.transpose(1, 2)
    return relative_to_multiple(ours, theirs) if scaled else relative(ours, theirs)


def _written(
    call: Call, stack: Stack, w_v: Float[Tensor, "kv_heads rank hidden"], w_o: Float[Tensor, "heads rank width"]
) -> float:
    """How far what single heads write is from `W_O Σ_t p_t W_V y_t`, and their values from `W_V y`, relative to the largest."""
    reading = call.reading
    if reading is None or reading.given is None:
        raise HeadgramError(f"the model's attention at {call.module} hands its heads to no output projection")
    if reading.has_sink:
        call.between.add("sink")
    if call.between and not {"value", "output"} & stack.notes.keys():
        raise HeadgramError(f"the model has a {sorted(call.between)[0]} between values and outputs at {call.module}, unremarked")
    value = call.z @ w_v.repeat_interleave(len(w_o) // len(w_v), 0).transpose(1, 2)
    if value.shape != reading.value.shape:
        return math.inf
    return max(
        relative(value, reading.value),
        relative(reading.given, reading.side_by_side),
        relative(reading.weights @ value @ w_o, reading.written(reading.heads)),
    )
