"""What stands around projections, against the running model: norms, biases, rotary encoding, scale and bound of scores.

Queries and keys of tokens at different positions are followed from the stream: `x = N(h)`, with `h` what the block receives; then
`q = R(p) N_q(W_Q x + b_Q)` and likewise for keys. Their cosines must be the model's. What softmax is given, in a run without
norms, biases and positions, is `c tanh(scale x^T g x / c)`, and what is added by position: nothing, or the same in all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgram.checkpoints.around import Around
from headgram.checkpoints.checkpoint import Checkpoint
from headgram.checkpoints.stack import Stack
from headgram.errors import HeadgramError
from headgram.families.around import NormRule
from headgram.forms.reading import Norm, Rotary
from headgram.proofs.calls import Call
from headgram.proofs.products import relative

#: Roles that are proven together: queries and keys at different positions follow from all of them.
CHAIN = ("query_norm", "key_norm", "query_bias", "key_bias", "rotary")
#: And these, from what softmax is given.
SOFTMAX = ("scale", "cap")
#: What softmax is given of a pair that is masked.
_MASKED = -1e4
_EPSILONS = ("eps", "variance_epsilon", "norm_eps", "layer_norm_eps", "epsilon")


@dataclass(frozen=True)
class Matched:
    """A layer of a checkpoint, and the model's attention there: as it is, and without norms, biases and positions."""

    stack: Stack
    around: Around
    w_q: Float[Tensor, "heads rank hidden"]
    w_k: Float[Tensor, "kv_heads rank hidden"]
    free: Call
    neutral: Call


def around_residuals(layers: Sequence[Matched]) -> dict[str, float]:
    """Of all layers of one stack: each role that its family's data know, and how far what follows from it is from the model's.

    Raises
    ------
    HeadgramError
        If the data know some of the roles that are proven together, and not all.
    """
    missing = layers[0].stack.missing
    found: dict[str, float] = {}
    if "norm" not in missing:
        found["norm"] = max(norm_residual(one.free, one.free.stream, one.around.norm, one.free.x) for one in layers)
    if "source_norm" not in missing:
        found["source_norm"] = max(norm_residual(one.free, one.free.source, one.around.source_norm, one.free.y) for one in layers)
    if "output_norm" not in missing:
        found["output_norm"] = max(output_residual(one.free, one.around) for one in layers)
    for together in (CHAIN, SOFTMAX):
        known = [role for role in together if role not in missing]
        if known and len(known) < len(together):
            raise HeadgramError(
                f"the role '{known[0]}' cannot be proven, for the family's data lack others that it is proven with"
            )
    if CHAIN[0] not in missing:
        found |= dict.fromkeys(CHAIN, max(chain_residual(one) for one in layers))
    if SOFTMAX[0] not in missing:
        found |= dict.fromkeys(SOFTMAX, scale_residual(layers))
    return found


def table_residuals(model: Any, checkpoint: Checkpoint) -> dict[str, float]:
    """The tables of tokens that the model says it has, and how far the checkpoint's are from them, relative to the largest.

    Raises
    ------
    HeadgramError
        If the checkpoint lacks one of them.
    """
    found = {}
    asked = {"embedding": (model.get_input_embeddings, checkpoint.embedding)}
    asked["unembedding"] = (model.get_output_embeddings, checkpoint.unembedding)
    for role, (theirs, ours) in asked.items():
        with suppress(NotImplementedError):
            weight = getattr(theirs(), "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:  # patches of images have more
                found[role] = relative(ours().double(), weight.double())
    return found


def final_norm_residual(model: Any, checkpoint: Checkpoint, rule: NormRule, inputs: Mapping[str, Any]) -> dict[str, float]:
    """How far the input of the unembedding is from what the named norm makes of its own input; empty without an unembedding.

    Both at unit length: some models multiply it by a number.

    Raises
    ------
    HeadgramError
        If the model has no such module, or the checkpoint no such tensor.
    """
    head = model.get_output_embeddings()
    if head is None:
        return {}
    modules = [module for name, module in model.named_modules() if f".{name}".endswith(f".{rule.module}")]
    norm = checkpoint.token_tables.final_norm()
    if not modules or norm is None:
        raise HeadgramError(f"the model has no norm '{rule.module}' before its unembedding")
    streams: dict[str, Tensor] = {}
    # Other towers may have a norm of that name, too: the last that runs before the unembedding is meant.
    hooks = [
        each.register_forward_pre_hook(lambda _, given, name=name: streams.__setitem__(name, given[0]))
        for name, each in (*(("norm", module) for module in modules), ("head", head))
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    ours, theirs = (nn.functional.normalize(x, dim=-1) for x in (_normed(streams["norm"], norm), streams["head"]))
    return {"final_norm": relative(ours, theirs)}


def without_epsilon(model: nn.Module) -> None:
    """Let every norm of a model divide by the norm itself, without the small number that is added to it."""
    for module in model.modules():
        for name in _EPSILONS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def output_residual(call: Call, around: Around) -> float:
    """How far what is added to the stream is from what heads write after its norm, or from one multiple of that.

    Raises
    ------
    HeadgramError
        If the family's data name no norm, or nothing was seen to be added.
    """
    norm = around.output_norm
    if call.written is None or call.added is None:
        raise HeadgramError(f"what the heads at {call.module} write was not seen to be added to a stream")
    written, added = (each.double().reshape(-1, each.shape[-1]) for each in (call.written, call.added))
    ours = written if norm is None else _normed(written, norm)
    return relative(ours * ((ours * added).sum() / ours.square().sum()), added)


def norm_residual(call: Call, other: Tensor | None, norm: Norm | None, read: Float[Tensor, "tokens width"]) -> float:
    """How far what queries, or keys, are made of is from their stream after a norm, relative to the largest.

    In self-attention, the stream is what the block is given. In cross-attention, which is not a block's first module, it is
    `other`: of queries, what the block's result is added to; of keys, what the last block has left of the stack before.

    Raises
    ------
    HeadgramError
        If there is no such stream: the block does not run, or nothing has run before.
    """
    stream = call.outer.get(call.block) if call.one_stream else other
    if stream is None:
        raise HeadgramError(f"the model gives no stream to the block around {call.module}")
    stream = stream.double().reshape(-1, stream.shape[-1])
    ours = stream if norm is None else _normed(stream, norm)
    if norm is None or norm.bias is not None:
        return relative(ours, read)
    return relative(*(nn.functional.normalize(x, dim=-1) for x in (ours, read)))


def chain_residual(one: Matched) -> float:
    """How far cosines of queries and keys are from the model's; rows that turn and rows that do not, apart, in latent attention.

    Raises
    ------
    HeadgramError
        If the family's data do not say what they follow from.
    """
    call, around = one.free, one.around
    rotary = around.rotary(length=len(call.x))
    query = _side(call.x, one.w_q, around.query_bias, around.query_norm, rotary)
    key = _side(call.y, one.w_k, around.key_bias, around.key_norm, rotary).repeat_interleave(len(one.w_q) // len(one.w_k), 0)
    split = one.stack.dimensions.sizes.get("nope", 0)
    parts = (slice(split), slice(split, None)) if split else (slice(None),)
    return max(
        relative(_cosines(query[..., part], key[..., part]), _cosines(call.query[..., part], call.key[..., part]))
        for part in parts
    )


def scale_residual(layers: Sequence[Matched]) -> float:
    """How far what softmax is given is from the scaled and bounded scores of a stack's layers, but for what positions add.

    Raises
    ------
    HeadgramError
        If the family's data name no scale or no bound, or no softmax follows the scores.
    """
    left, sizes = [], []
    for one in layers:
        call, cap, scores = one.neutral, one.around.cap, forms_of(one.neutral, one.w_q, one.w_k)
        if call.logits is None:
            raise HeadgramError(f"no softmax follows the scores of {call.module}")
        scaled = one.around.scale * scores
        logits = call.logits[..., : scores.shape[-1]]
        bounded = scaled if cap is None else cap * (scaled / cap).tanh()
        difference = torch.where(logits.abs() < -_MASKED, logits - bounded, math.nan)
        left.append(difference - difference.nanmean(-1, keepdim=True))  # softmax does not see what all of a row share
        sizes.append(float(bounded.abs().max()))
    alone = [float(difference.abs().nan_to_num().max()) for difference in left]
    shared = [float((difference - left[0]).abs().nan_to_num().max()) for difference in left[1:]] or [math.inf]
    return min(max(alone), max(shared)) / min(sizes)


def forms_of(
    call: Call, w_q: Float[Tensor, "heads rank hidden"], w_k: Float[Tensor, "kv_heads rank hidden"]
) -> Float[Tensor, "heads t s"]:
    """`x_s^T g x_t` of every head and every pair of tokens."""
    keys = call.y @ w_k.repeat_interleave(len(w_q) // len(w_k), 0).transpose(1, 2)
    return (call.x @ w_q.transpose(1, 2)) @ keys.transpose(1, 2)


def _normed(x: Float[Tensor, "*tokens width"], norm: Norm) -> Float[Tensor, "*tokens width"]:
    """A norm with its division, if it divides, without its epsilon."""
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    x = x / x.square().mean(-1, keepdim=True).sqrt() if norm.divides else x
    x = x if norm.gain is None else x * norm.gain
    return x if norm.bias is None else x + norm.bias


def _side(
    x: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "heads rank hidden"],
    bias: Float[Tensor, "heads rank"] | None,
    norm: Norm | None,
    rotary: Rotary | None,
) -> Float[Tensor, "heads tokens rank"]:
    """Queries or keys of tokens at the positions 0, 1, 2, ..."""
    projected = weight @ x.T
    projected = projected if bias is None else projected + bias[..., None]
    if norm is not None:
        projected = _normed(projected.permute(2, 0, 1), norm).permute(1, 2, 0)
    if rotary is None:
        return projected.mT
    turned = rotary.turned(projected, torch.arange(len(x)))
    turned[:, torch.cat(rotary.rows)] *= rotary.factor
    return turned.mT


def _cosines(query: Float[Tensor, "heads t rank"], key: Float[Tensor, "heads s rank"]) -> Float[Tensor, "heads t s"]:
    return nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(key, dim=-1).mT
