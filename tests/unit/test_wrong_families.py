"""What is wrong in the data of a family is noticed when it is proven."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import reconfigured, saved

from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError
from headgram.families import layouts
from headgram.families.registry import family_of
from headgram.proofs.calls import Call
from headgram.proofs.prove import prove


def _changed(layout: str, change: Callable[[layouts.Dimensions, layouts.Factors], layouts.Factors]) -> tuple[layouts.Part, ...]:
    """A layout that gives something else."""

    def wrapped(part: layouts.Part) -> layouts.Part:
        return dataclasses.replace(part, split=lambda dims, **tensors: change(dims, part.split(dims, **tensors)), rows=None)

    return tuple(wrapped(part) for part in layouts.LAYOUTS[layout])


def _exchanged(one: str, other: str) -> Callable[[layouts.Dimensions, layouts.Factors], layouts.Factors]:
    """One weight for another of the same tensor: keys for queries is invisible to `x_t^T g x_t`."""
    names = {one: other, other: one}
    return lambda _, factors: {role: factors[names.get(role, role)] for role in factors}


def _reordered(role: str) -> Callable[[layouts.Dimensions, layouts.Factors], layouts.Factors]:
    """Head `h` for head `h + 1`."""
    return lambda _, factors: {name: factor.roll(1, 0) if name == role else factor for name, factor in factors.items()}


def _other_pairing(dims: layouts.Dimensions, factors: layouts.Factors) -> layouts.Factors:
    """Query head `h` with key head `h mod K` instead of `h // (H / K)`."""
    if "query" not in factors:
        return factors
    q = factors["query"]
    return {**factors, "query": q.view(-1, dims.kv_heads, dims.rank, dims.hidden).transpose(0, 1).reshape(q.shape)}


def _channel_by_channel(dims: layouts.Dimensions, factors: layouts.Factors) -> layouts.Factors:
    """Columns of `W_O` as if the channels came first and the heads second."""
    if "output" not in factors:
        return factors
    rows = factors["output"].reshape(dims.value_rank, dims.heads, dims.output_width)
    return {**factors, "output": rows.transpose(0, 1).contiguous()}


@pytest.mark.parametrize(
    ("model_type", "layout", "wrong"),
    [
        ("gpt_neox", "interleaved", layouts.LAYOUTS["blocks"]),
        ("gpt_neox", "interleaved", _changed("interleaved", _exchanged("query", "key"))),
        ("gpt_neox", "interleaved", _changed("interleaved", _exchanged("key", "value"))),
        ("codegen", "quarters", layouts.LAYOUTS["blocks"]),
        ("codegen", "quarters", _changed("quarters", _reordered("value"))),
        ("phi3", "blocks", layouts.LAYOUTS["interleaved"]),
        ("llama", "separate", _changed("separate", _other_pairing)),
        ("llama", "separate", _changed("separate", _reordered("value"))),
        ("llama", "separate", _changed("separate", _reordered("output"))),
        ("llama", "separate", _changed("separate", _channel_by_channel)),
        ("gpt2", "column_blocks", _changed("column_blocks", _reordered("output"))),
        ("deepseek_v3", "latent", _changed("latent", _reordered("value"))),
        ("qwen3_next", "gated", _changed("gated", _reordered("output"))),
        ("convbert", "beside", _changed("beside", _reordered("output"))),
        ("longt5", "separate", _changed("separate", _reordered("value"))),
        ("granite_speech", "key_value_blocks", _changed("key_value_blocks", _exchanged("key", "value"))),
    ],
)
def test_a_wrong_layout_is_off_by_order_one(
    monkeypatch: pytest.MonkeyPatch, model_type: str, layout: str, wrong: tuple[layouts.Part, ...]
) -> None:
    monkeypatch.setitem(layouts.LAYOUTS, layout, wrong)
    proof = prove(model_type)
    assert not proof.ok
    assert proof.residual > 0.1


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next", "bitnet", "laguna", "granite_swa", "gemma4_text"])
def test_what_lies_between_values_and_outputs_must_be_remarked(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    family = family_of(model_type)
    silent = tuple(rule.model_copy(update={"remarks": ()}) for rule in family.stacks)
    monkeypatch.setattr("headgram.checkpoints.declared.family_of", lambda _: family.model_copy(update={"stacks": silent}))
    assert "between values and outputs" in (prove(model_type).problem or "")


def test_places_that_a_module_adds_to_what_queries_and_keys_read_must_be_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of("detr")
    silent = tuple(rule.model_copy(update={"remarks": ()}) for rule in family.stacks)
    monkeypatch.setattr("headgram.checkpoints.declared.family_of", lambda _: family.model_copy(update={"stacks": silent}))
    assert "adds places to what queries and keys read" in (prove("detr").problem or "")


@pytest.mark.parametrize("hiding", ["one token", "zeros", "no number"])
def test_what_hides_the_weights_shows_nothing_of_them(hiding: str) -> None:
    x = torch.ones(1 if hiding == "one token" else 3, 8)
    x = x * {"one token": 1, "zeros": 0, "no number": float("nan")}[hiding]
    assert not Call("attention", x[None], x[None], x, x, x).telling
    seen = torch.ones(3, 8)
    assert Call("attention", seen[None], seen[None], seen, seen, seen).telling


def test_keys_that_the_data_calls_queries_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT's queries and keys exchanged, in data instead of code."""
    family = family_of("bert")
    (rule,) = family.stacks
    names = {**rule.modules, "query": rule.modules["key"], "key": rule.modules["query"]}
    wrong = family.model_copy(update={"stacks": (rule.model_copy(update={"modules": names}),)})
    monkeypatch.setattr("headgram.checkpoints.declared.family_of", lambda _: wrong)
    assert prove("bert").residual > 0.1


def test_a_stack_that_the_registry_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of("t5")
    monkeypatch.setattr(
        "headgram.checkpoints.declared.family_of", lambda _: family.model_copy(update={"stacks": family.stacks[:2]})
    )
    assert "belongs to no stack" in (prove("t5").problem or "")


@pytest.mark.parametrize(
    ("model_type", "number", "changes", "sentence"),
    [
        ("llama", 0, {"num_attention_heads": 6}, r"layer 0: tensor layers\.0\S*q_proj\.weight has shape \(48, 48\), but 6 query"),
        ("gpt_neox", 0, {"hidden_size": 40}, r"layer 0: tensor layers\.0\S*query_key_value\.weight has shape \(144, 48\)"),
        ("codegen", 0, {"n_head": 3}, r"layer 0: 3 heads do not divide into the 4 parts"),
        ("deepseek_v3", 0, {"kv_lora_rank": 21}, r"layer 0: tensor layers\.0\S*kv_a_proj_with_mqa\.weight has shape \(24, 48\)"),
        ("llama", 0, {"num_hidden_layers": 3}, r"layer 2: the checkpoint lacks tensor layers\.2\.self_attn\.q_proj\.weight"),
        ("qwen2", 0, {"num_attention_heads": None}, r"does not state num_attention_heads: add it there, or set `heads`"),
        ("llama", 0, {"num_hidden_layers": -1}, r"num_hidden_layers = -1, which should be a whole number of at least 1"),
        ("llama", 0, {"num_hidden_layers": 2**31 - 1}, r"declares 2,147,483,647 layers, which no real model has"),
        ("llama", 0, {"per_layer_config": {"1": {"head_dim": 6}}}, r"changes layers 0 to 1 differently"),
        ("llama", 0, {"per_layer_config": {"01": {"head_dim": 6}}}, r"changes layers 0 to 1 differently"),
        ("zamba2", 0, {"use_shared_attention_adapter": True}, r"adapter = True, a variant whose layout is not known"),
        ("gpt_bigcode", 0, {"multi_query": None}, r"multi_query = None, a variant whose layout is not known"),
        ("llama", 0, {"num_attention_heads": [4, 4]}, r"num_attention_heads = \[4, 4\], which should be a whole number"),
        ("gemma4_text", 0, {"layer_types": ["full_attention"]}, r"should have a list `layer_types` of 6 entries"),
        ("llama", 0, {"model_type": "llamma"}, r"the model type 'llamma' is not known \(the nearest known one is 'llama'\)"),
        ("llava", 0, {"text_config": {}}, r"names no text tower's type"),
    ],
)
def test_a_disagreement_is_one_sentence(
    tmp_path: Path, model_type: str, number: int, changes: dict[str, object], sentence: str
) -> None:
    folder = reconfigured(saved(model_type, tmp_path, number), **changes)
    with pytest.raises(HeadgramError, match=sentence) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
