"""Norms, biases, scales and what is said of them: in odd configurations, and where data or files are wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import WAVES, residuals, saved, tiny
from safetensors.torch import load_file, save_file

from headgram import HeadgramError, open_checkpoint
from headgram.checkpoints.dimensions import Section
from headgram.families.around import AROUND, AroundRule, NormRule, RotaryRule, ScaleRule, rule_of
from headgram.families.registry import adopting, families, family_of
from headgram.proofs.prove import TOLERANCE
from headgram.results.around import around_of
from headgram.study.manifest import Row
from headgram.study.resolve import resolve


def test_a_scale_that_a_section_states_is_refused(tmp_path: Path) -> None:
    """MPT's `attn_config.softmax_scale`; null, it is the usual one."""
    model, _ = tiny("mpt")
    folder = saved(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.around("self", 0).scale == pytest.approx(checkpoint.stack("self").rank ** -0.5)
    config["attn_config"] = {**config.get("attn_config", {}), "softmax_scale": 0.5, "clip_qkv": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    with open_checkpoint(folder) as checkpoint, pytest.raises(HeadgramError, match=r"states attn_config\.softmax_scale"):
        _ = checkpoint.around("self", 0).scale
    with open_checkpoint(folder) as checkpoint:
        assert "values are clipped at clip_qkv" in around_of("ov", checkpoint.frames("self"))["not_folded"]


@pytest.mark.parametrize(
    ("model_type", "number", "flags"),
    [
        ("opt", 0, {"do_layer_norm_before": False}),
        ("wav2vec2", 0, {"do_stable_layer_norm": True}),
        ("cohere", 0, {"use_qk_norm": True}),
        ("glm4_moe", 0, {"use_qk_norm": True}),
        ("phi", 0, {"qk_layernorm": True}),
        ("gpt2", 0, {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt_bigcode", 0, {"scale_attn_weights": False}),
        ("deepseek_v3", 0, {"rope_interleave": False}),
        ("mistral4", 0, {"rope_interleave": False}),
        ("glm4_moe_lite", 0, {"rope_interleave": False}),
        ("falcon", 0, {"num_ln_in_parallel_attn": 1}),
        ("granitemoehybrid", 0, {"position_embedding_type": "rope"}),
        ("zamba2", 0, {"use_mem_rope": True}),
        ("esm", 0, {"position_embedding_type": "rotary"}),
        ("llama", 0, {"attention_bias": True}),
        ("granite_swa", 0, {"layer_rope_theta": [0.0, 500.0]}),
        ("granitemoe_swa", 0, {"layer_rope_theta": [300.0, 500.0]}),
        ("cohere2_moe", 0, {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention", "full_attention"]}),
        ("falcon_h1", 0, {"key_multiplier": 0.37, "attention_in_multiplier": 0.6}),
        ("hyperclovax", 0, {"attention_multiplier": 0.3}),
        ("exaone4", 0, {"sliding_window": "null", "layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_switches_of_a_configuration(tmp_path: Path, model_type: str, number: int, flags: dict[str, Any]) -> None:
    model, entry = tiny(model_type, **flags)
    assert max(residuals(model, saved(model, tmp_path), entry).values()) < TOLERANCE


NONE = NormRule(kind="none")


@pytest.mark.parametrize(
    ("model_type", "role", "wrong"),
    [
        ("gemma2", "norm", {"norm": NormRule(kind="rms", module="input_layernorm")}),
        ("gpt2", "norm", {"norm": NormRule(kind="rms", module="ln_1")}),
        ("olmo2", "norm", {"norm": NormRule(kind="rms", module="post_attention_layernorm")}),
        ("bert", "norm", {"norm": NormRule(kind="layer", module="attention.output.LayerNorm")}),
        ("qwen3", "query_norm", {"query_norm": NONE}),
        ("olmo2", "key_norm", {"key_norm": NormRule(kind="layer", module="self_attn.k_norm")}),
        ("llama", "rotary", {"rotary": RotaryRule(kind="interleaved")}),
        ("llama", "rotary", {"rotary": RotaryRule(kind="halves", sign=-1)}),
        ("cohere", "rotary", {"rotary": RotaryRule(kind="halves")}),
        ("cohere2", "rotary", {"rotary": RotaryRule(kind="interleaved")}),
        ("bert", "rotary", {"rotary": RotaryRule(kind="halves")}),
        ("gpt_neo", "scale", {"scale": ScaleRule()}),
        ("granite", "scale", {"scale": ScaleRule()}),
        ("gemma2", "cap", {"cap": ""}),
        ("gemma2", "output_norm", {"output_norm": NONE}),
        ("gemma2", "output_norm", {"output_norm": NormRule(kind="rms", module="post_attention_layernorm")}),  # 1 + w
        ("olmo2", "output_norm", {"output_norm": NormRule(kind="rms", module="post_feedforward_layernorm")}),
        ("llama", "output_norm", {"output_norm": NormRule(kind="rms", module="post_attention_layernorm")}),
        ("dinov2", "output_norm", {"output_norm": NONE}),
        ("dinov2", "output_norm", {"output_norm": NormRule(kind="gain", module="layer_scale2.lambda1")}),
        ("beit", "output_norm", {"output_norm": NONE}),
    ],
)
def test_wrong_data_are_off_by_order_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, role: str, wrong: dict[str, Any]
) -> None:
    monkeypatch.setattr("headgram.checkpoints.stack.rule_of", lambda *given: rule_of(*given).model_copy(update=wrong))
    changes = {"rope_parameters": {**WAVES, "rope_type": "default"}, "attention_multiplier": 0.5} if role != "norm" else {}
    model, entry = tiny(model_type, **(changes if model_type == "granite" else {}))
    assert residuals(model, saved(model, tmp_path), entry)[role] > 1e-3


@pytest.mark.parametrize(
    ("model_type", "role", "wrong"),
    [
        ("whisper", "source_norm", {"source": NONE}),
        ("whisper", "norm", {"norm": NormRule(kind="layer", module="self_attn_layer_norm")}),
        ("t5", "source_norm", {"source": NormRule(kind="layer", module="encoder.final_layer_norm")}),
        ("t5", "source_norm", {"source": NormRule(kind="rms", module="decoder.final_layer_norm")}),
        ("t5", "norm", {"norm": NormRule(kind="rms", module="layer.0.layer_norm")}),
        ("bart", "source_norm", {"source": NormRule(kind="layer", module="encoder.layernorm_embedding")}),
        ("bart", "norm", {"norm": NormRule(kind="layer", module="self_attn_layer_norm")}),
        ("nllb-moe", "norm", {"norm": NormRule(kind="layer", module="self_attn_layer_norm")}),
        ("moonshine", "norm", {"norm": NormRule(kind="layer", module="input_layernorm")}),
        ("t5gemma", "source_norm", {"source": NormRule(kind="rms", module="decoder.norm", plus=1)}),
        ("t5gemma", "output_norm", {"output_norm": NormRule(kind="rms", module="post_self_attn_layernorm", plus=1)}),
        ("t5gemma", "output_norm", {"output_norm": NONE}),
    ],
)
def test_wrong_norms_of_cross_attention_are_off_by_order_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, role: str, wrong: dict[str, Any]
) -> None:
    def changed(*given: Any) -> AroundRule:
        said = rule_of(*given)
        return said.model_copy(update=wrong) if said.source else said

    model, entry = tiny(model_type)
    folder = saved(model, tmp_path)
    assert residuals(model, folder, entry)[role] < TOLERANCE
    monkeypatch.setattr("headgram.checkpoints.stack.rule_of", changed)
    assert residuals(tiny(model_type)[0], folder, entry)[role] > 1e-3


@pytest.mark.parametrize("stated", [0.1, 0.0, None])
def test_a_model_without_layer_scale_has_none(tmp_path: Path, stated: float | None) -> None:
    """A configuration that leaves it unsaid has one."""
    model, _ = tiny("beit", layer_scale_init_value=0.1 if stated is None else stated)
    path = saved(model, tmp_path) / "config.json"
    config = {**json.loads(path.read_text()), "layer_scale_init_value": stated}
    path.write_text(
        json.dumps({name: value for name, value in config.items() if name != "layer_scale_init_value" or value is not None})
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.around("self", 0).output_norm is None) == (stated == 0.0)


def test_biases_that_are_left_out_are_noticed(tmp_path: Path) -> None:
    model, entry = tiny("qwen2")
    folder = saved(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: x for name, x in tensors.items() if "k_proj.bias" not in name}, folder / "model.safetensors", {"format": "pt"}
    )
    assert residuals(model, folder, entry)["key_bias"] > 0.01


def test_what_is_read_may_be_multiplied_after_its_norm(tmp_path: Path) -> None:
    """Falcon-H1's multiplier of what attention reads is part of the norm's gain."""
    model, _ = tiny("falcon_h1", attention_in_multiplier=0.6)
    read: list[torch.Tensor] = []
    layer = model.layers[0]
    layer.self_attn.register_forward_pre_hook(lambda *given: read.append(given[2]["hidden_states"]), with_kwargs=True)
    streams: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
    model(torch.arange(5)[None])
    with open_checkpoint(saved(model, tmp_path)) as checkpoint:
        norm = checkpoint.around("self", 0).norm
    assert norm is not None
    assert norm.gain is not None
    divided = streams[0] / streams[0].square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(read[0].double(), divided.double() * norm.gain, rtol=1e-3, atol=1e-4)


ADDED = "a number that depends on the distance alone is added to scores"


@pytest.mark.parametrize(
    ("model_type", "flags", "form", "said"),
    [
        ("llama4_text", {"use_qk_norm": True}, "qk", "that positions turn are divided by their lengths afterwards"),
        ("llama4_text", {"attn_temperature_tuning": True}, "qk", "are multiplied by a number that grows with their position"),
        ("ministral3", {}, "qk", "queries are multiplied by a number that grows with their position"),
        ("mistral4", {}, "qk", "queries are multiplied by a number that grows with their position"),
        ("olmo", {"clip_qkv": 0.5}, "qk", "queries and keys are clipped at clip_qkv"),
        ("olmoe", {"clip_qkv": 0.5}, "ov", "values are clipped at clip_qkv"),
        ("mpt", {}, "qk", ADDED),
        ("bloom", {}, "qk", ADDED),
        ("mpnet", {}, "qk", ADDED),
        ("t5", {}, "qk", ADDED),
        ("beit", {"use_relative_position_bias": True}, "qk", ADDED),
        ("falcon_h1", {}, "ov", "what heads write is multiplied by attention_out_multiplier"),
        ("phi", {"qk_layernorm": True}, "qk", "biases of these norms add terms that are linear in one token"),
    ],
)
def test_what_stands_between_a_form_and_scores_is_named(
    tmp_path: Path, model_type: str, flags: dict[str, Any], form: str, said: str
) -> None:
    off = {"use_qk_norm": False, "attn_temperature_tuning": False} if model_type == "llama4_text" else {}
    for switches in (flags, off):
        model, _ = tiny(model_type, **{**off, **switches})
        with open_checkpoint(saved(model, tmp_path)) as checkpoint:
            named = said in around_of(form, checkpoint.frames(checkpoint.stacks[0].name))["not_folded"]
        assert named == (switches is flags or not flags)


def test_roles_that_are_left_out_for_one_reason_are_one_clause(tmp_path: Path) -> None:
    model, _ = tiny("deberta")
    with open_checkpoint(saved(model, tmp_path)) as checkpoint:
        said = around_of("qk", checkpoint.frames("self"))["not_folded"]
    roles = "query norm, key norm, query bias, key bias, rotary, scale, cap"
    assert f"{roles} cannot be read: scores are sums over contents and relative positions" in said
    assert said.count("scores are sums over contents") == 1


def with_tensors(folder: Path, added: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **added}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("role", "name"), [("query_bias", "self_attn.q_proj"), ("key_bias", "self_attn.k_proj"), ("norm", "self_attn_layer_norm")]
)
def test_a_bias_that_one_layer_lacks_is_no_bias_of_nothing(tmp_path: Path, role: str, name: str) -> None:
    """Its tensors were lost; a model whose layers all lack it has none."""
    tensors = load_file(saved(tiny("opt")[0], tmp_path) / "model.safetensors")
    held = [key for key in tensors if key.endswith(f"{name}.bias")]
    for lost in (held[1:2], held):
        kept = {key: tensor for key, tensor in tensors.items() if key not in lost}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with open_checkpoint(tmp_path) as checkpoint:
            read = checkpoint.frames("self").missing
        locked = resolve(Row(line=2, name="opt", source=str(tmp_path), revision=None, overrides={})).stacks[0].around
        assert locked is not None
        for missing in (read, locked.missing):  # what a job reads is what the lock says
            assert (role in missing) == (lost != held)
            assert lost == held or f"lacks the bias of '{role}'" in missing[role]


def test_biases_that_the_configuration_denies(tmp_path: Path) -> None:
    """Zeros are nothing, and so is a bias of a norm that the model does not have; others are refused."""
    model, _ = tiny("llama")
    folder = saved(model, tmp_path)
    place, rows = "layers.0.self_attn.q_proj", model.layers[0].self_attn.q_proj.out_features
    with_tensors(folder, {f"{place}.bias": torch.zeros(rows), "layers.0.input_layernorm.bias": torch.ones(48)})
    with open_checkpoint(folder) as checkpoint:
        around = checkpoint.around("self", 0)
        assert around.query_bias is None
        assert around.norm is not None
        assert around.norm.bias is None
    with_tensors(folder, {f"{place}.bias": torch.ones(rows)})
    sentence = rf"attention_bias = false, but the checkpoint holds {place}\.bias, which is not zero: correct one of them"
    with open_checkpoint(folder) as checkpoint, pytest.raises(HeadgramError, match=sentence):
        _ = checkpoint.around("self", 0).query_bias


@pytest.mark.parametrize(
    ("model_type", "stack", "role", "sentence"),
    [
        ("hy_v4", "self", "norm", "no role 'norm' to read: it stands before a mixture of several streams"),
        ("hy_v4", "self", "source_norm", "no role 'source_norm' to read: it stands before a mixture of several streams"),
        ("doge", "self", "scale", "no role 'scale' to read: a mask that depends on"),
        ("ibert", "self", "cap", "no role 'cap' to read: its softmax"),
        ("deberta", "self", "query_bias", "no role 'query_bias' to read: scores are sums"),
        ("vit", "self", "embedding", "no embedding to read: the family's data name no such table"),
    ],
)
def test_what_is_not_proven_is_one_sentence(tmp_path: Path, model_type: str, stack: str, role: str, sentence: str) -> None:
    model, _ = tiny(model_type)
    with open_checkpoint(saved(model, tmp_path)) as checkpoint, pytest.raises(HeadgramError, match=sentence) as error:
        getattr(checkpoint.around(stack, 0), role) if role in AROUND else getattr(checkpoint, role)()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda name, x: {}, r"layer 1: the checkpoint lacks tensor layers\.1\.input_layernorm\.weight"),
        (lambda name, x: {name: x[:-1].clone()}, r"input_layernorm\.weight has shape \(47,\), which should be \(48,\)"),
        (lambda name, x: {name: x * math.nan}, r"input_layernorm\.weight holds a NaN or an infinity"),
    ],
)
def test_a_damaged_norm_is_one_sentence(tmp_path: Path, change: Callable[..., dict[str, Any]], sentence: str) -> None:
    model, _ = tiny("llama")
    path = saved(model, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    name = "layers.1.input_layernorm.weight"
    save_file({**{key: x for key, x in tensors.items() if key != name}, **change(name, tensors[name])}, path, {"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(HeadgramError, match=sentence):
        _ = checkpoint.around("self", 1).norm


def test_a_later_rule_says_anew_what_it_names() -> None:
    config = Section({"switch": True}, "b")
    rules = (
        AroundRule(norm=NONE, rotary=RotaryRule(kind="halves")),
        AroundRule(types=("a",), rotary=RotaryRule(kind="none")),
        AroundRule(types=("b",), when={"switch": True}, unproven={"scale": "why"}),
    )
    said = rule_of(rules, "b", config)
    assert said.rotary == RotaryRule(kind="halves")
    assert said.scale is None
    assert said.query_norm == NONE
    assert rule_of((), "b", config).norm is None


def test_rules_are_about_types_of_their_family() -> None:
    for family in families():
        assert {name for rule in family.stacks for around in rule.around for name in around.types} <= set(family.model_types)


def test_a_type_that_is_claimed_or_adopted_has_its_layout_alone(tmp_path: Path) -> None:
    """Its norms and its rotary encoding may be others than those of the type that it is read as."""
    model, _ = tiny("qwen3")
    folder = saved(model, tmp_path)
    with open_checkpoint(folder, overrides={"model_type": "afmoe"}) as checkpoint:
        assert checkpoint.stack("self").roles == ("query", "key", "value", "output")
        with pytest.raises(HeadgramError, match="no role 'norm' to read: .* the layout of 'afmoe' alone"):
            _ = checkpoint.around("self", 0).norm
        with pytest.raises(HeadgramError, match="no embedding to read"):
            checkpoint.embedding()
    with adopting("new", family_of("llama")), open_checkpoint(folder, overrides={"model_type": "new"}) as checkpoint:
        assert set(AROUND) <= set(checkpoint.stack("self").missing)
