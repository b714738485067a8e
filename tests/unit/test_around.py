"""Norms, biases, rotary encoding, scales and tables of tokens: in odd configurations, and where data or files are wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headgram import HeadgramError, open_checkpoint
from headgram.checkpoints.dimensions import Section
from headgram.checkpoints.rotary import rotary_of
from headgram.families.around import AROUND, AroundRule, NormRule, RotaryRule, ScaleRule, rule_of
from headgram.families.registry import adopting, families, family_of
from headgram.proofs.listed import listed_models
from headgram.proofs.prove import TOLERANCE, _residuals, quiet
from headgram.results.around import around_of
from headgram.study.manifest import Row
from headgram.study.resolve import resolve_all

WAVES = {"rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
#: What `rope_parameters` of a tiny Llama may hold. Its contexts have 7 tokens.
SCALINGS = {
    "linear": LINEAR,
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, not rounded": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
    "yarn, a small base": {"rope_type": "yarn", "rope_theta": 2.0, "factor": 4.0, "original_max_position_embeddings": 100_000},
    "yarn, two shares": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 32,
    },
    "longrope, short": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
        "original_max_position_embeddings": 16,
    },
    "longrope, long": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
        "original_max_position_embeddings": 4,
    },
}


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


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_encoding_is_scaled_as_in_the_model(tmp_path: Path, scaling: str) -> None:
    longest = 5 if scaling == "dynamic" else 64  # a context of 7 tokens is longer than that
    model, entry = tiny("llama", rope_parameters={**WAVES, **SCALINGS[scaling]}, max_position_embeddings=longest)
    assert residuals(model, saved(model, tmp_path), entry)["rotary"] < TOLERANCE


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, SCALINGS["yarn"]])
def test_some_rows_turn_and_others_do_not(tmp_path: Path, scaling: dict[str, Any]) -> None:
    """YaRN scales those that turn, and not the others."""
    model, entry = tiny("phi", rope_parameters={**WAVES, **scaling, "partial_rotary_factor": 0.5})
    assert residuals(model, saved(model, tmp_path), entry)["rotary"] < TOLERANCE


def test_yarn_changes_the_scale_of_latent_attention(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32}
    model, entry = tiny("deepseek_v3", rope_parameters={**WAVES, **scaling})
    folder = saved(model, tmp_path)
    assert max(residuals(model, folder, entry).values()) < TOLERANCE
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.around("self", 0).scale == pytest.approx(12**-0.5 * (0.1 * math.log(40) + 1) ** 2)


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


_SHORT_AND_LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6}
OLDER: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "gpt_neox": {"rotary_emb_base": 500, "rotary_pct": 0.5, "rope_theta": 50.0, "partial_rotary_factor": 0.34},
    "phi": {"rope_theta": 500.0, "partial_rotary_factor": 0.34},
    "gemma3_text": {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "modernbert": {"global_rope_theta": 500.0, "local_rope_theta": 50.0},
    "minimax_m2": {"rope_theta": 500.0, "rotary_dim": 6},
    "cohere2_moe": {"rope_theta": 500.0, "first_k_dense_replace": 1, "layer_types": None, "mlp_layer_types": None},
    "phi3": {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **_SHORT_AND_LONG}, "original_max_position_embeddings": 32},
    "qwen2": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},  # which no Qwen 2 reads
    "deepseek_v3": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},  # nor this
    "glm4_moe_lite": {"rope_theta": 500.0, "partial_rotary_factor": 1.0},  # of those rows of its rank that turn
    "mistral4": {},
    "laguna": {},
    "mellum": {"layer_types": None, "partial_rotary_factor": 0.5},
    "gpt_oss": {"rope_theta": 500.0},
    "ministral3": {"rope_parameters": None},
}


@pytest.mark.parametrize("model_type", OLDER)
def test_older_names_in_configurations(tmp_path: Path, model_type: str) -> None:
    """As configurations were written before transformers 5: the model is loaded from them, and so are we."""
    from transformers import AutoModel

    model, entry = tiny(model_type)
    folder = saved(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps({**config, **OLDER[model_type]}))
    with quiet():
        model = AutoModel.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager").eval()
    assert residuals(model, folder, entry)["rotary"] < TOLERANCE


@pytest.mark.parametrize("kinds", [{}, {"full_attention": {**LINEAR}, "sliding_attention": {"rope_type": "default"}}])
def test_bases_of_sliding_layers_that_are_left_unsaid(tmp_path: Path, kinds: dict[str, Any]) -> None:
    """Gemma 3's are others than those of its full layers, whether its parameters are stated or not."""
    from transformers import AutoModel

    model, entry = tiny("gemma3_text")
    folder = saved(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": kinds or None}))
    with quiet():
        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert residuals(model, folder, entry)["rotary"] < TOLERANCE


def test_one_base_for_kinds_of_layers_that_have_their_own_is_refused(tmp_path: Path) -> None:
    """The model passes over it."""
    model, _ = tiny("gemma3_text")
    path = saved(model, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": {**WAVES, "rope_type": "default"}}))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(HeadgramError, match="reads one for each kind of layer"):
        checkpoint.around("self", 0).rotary()


def test_phi_3_was_trained_on_contexts_of_a_length_that_is_left_unsaid(tmp_path: Path) -> None:
    """What its scaling states of that does not count."""
    from transformers import AutoModel

    model, _ = tiny("phi3")
    folder = saved(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "original_max_position_embeddings"):
        config.pop(name)
    scaling = {"type": "longrope", "original_max_position_embeddings": 4, **_SHORT_AND_LONG}
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0, "rope_scaling": scaling}))
    with quiet():
        model = AutoModel.from_pretrained(folder)
    cosine, sine = model.rotary_emb(torch.zeros(1), torch.arange(7)[None])
    lengths = (cosine**2 + sine**2).sqrt()
    with open_checkpoint(folder) as checkpoint:
        rotary = checkpoint.around("self", 0).rotary(7)
    assert rotary is not None
    torch.testing.assert_close(lengths, torch.full_like(lengths, rotary.factor))


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


def test_defaults_of_rotary_encoding_are_those_of_transformers() -> None:
    """What a configuration leaves unsaid: bases, shares and scalings."""
    from transformers import CONFIG_MAPPING

    compared = 0
    for family in families():
        for model_type in family.model_types:
            if not family.stacks or model_type not in CONFIG_MAPPING:
                continue
            with quiet():
                config = CONFIG_MAPPING[model_type]()
            config = getattr(config, family.stacks[0].config or "", config)
            stated = getattr(config, "rope_parameters", None)
            rule = rule_of(family.stacks[0].around, model_type, Section({}, model_type)).rotary
            nested = any(isinstance(value, dict) for value in (stated or {}).values())
            if not stated or nested or rule is None or rule.kind == "none" or rule.width:
                continue
            rest = {"layer_types": [rule.only], "max_position_embeddings": 4096, **rule.when}
            rest |= {rule.flags: [1]} if rule.flags else {}
            said = rotary_of(rule, Section({**rest, "rope_parameters": stated}, model_type), 0, 64, 0, None)
            unsaid = rotary_of(rule, Section.of(family.stacks[0], rest, model_type), 0, 64, 0, None)
            assert said is not None
            assert unsaid is not None
            torch.testing.assert_close(unsaid.frequencies, said.frequencies, msg=f"{model_type}: {stated}")
            assert unsaid.factor == pytest.approx(said.factor)
            compared += 1
    assert compared > 60


def test_a_share_of_the_rows_turns_where_the_model_reads_it() -> None:
    """As many planes as the model's own."""
    from transformers import CONFIG_MAPPING

    compared = set()
    stated = {**WAVES, "rope_type": "default", "partial_rotary_factor": 0.5}
    for family in families():
        for model_type in family.model_types:
            if model_type not in CONFIG_MAPPING or not family.stacks or model_type in ("laguna", "mellum"):
                continue
            rule = rule_of(family.stacks[0].around, model_type, Section({}, model_type)).rotary
            if rule is None or rule.kind == "none" or rule.width or rule.share is False:
                continue
            with suppress(Exception):  # models whose parameters are nested, or that have two towers
                model, _ = tiny(model_type, rope_parameters=stated)
                rank = model.config.head_dim if "latent" not in family.stacks[0].layout else model.config.qk_rope_head_dim
                rest = {"layer_types": [rule.only], "max_position_embeddings": 4096, **rule.when}
                rest |= {rule.flags: [1]} if rule.flags else {}
                found = rotary_of(rule, Section({**rest, "rope_parameters": stated}, model_type), 0, rank, 0, None)
                assert found is not None
                if len(found.frequencies) != len(model.rotary_emb.inv_freq):
                    pytest.fail(f"{model_type}: {len(found.frequencies)} planes, the model {len(model.rotary_emb.inv_freq)}")
                compared.add(rule.share)
    assert compared == {True, None}


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


def test_factors_of_short_and_long_contexts_are_those_of_the_model(tmp_path: Path) -> None:
    """PhiMoE scales what turns by `short_mscale` and `long_mscale`."""
    scaling = {"rope_type": "longrope", **_SHORT_AND_LONG, "original_max_position_embeddings": 16}
    model, _ = tiny("phimoe", rope_parameters={**WAVES, **scaling, "short_mscale": 1.3, "long_mscale": 1.9})
    with open_checkpoint(saved(model, tmp_path)) as checkpoint:
        for length in (16, 17):
            cosine, sine = model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
            lengths = (cosine**2 + sine**2).sqrt()
            rotary = checkpoint.around("self", 0).rotary(length)
            torch.testing.assert_close(lengths, torch.full_like(lengths, rotary.factor))


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
            missing = checkpoint.frames("self").missing
        assert (role in missing) == (lost != held)
        assert lost == held or f"lacks the bias of '{role}'" in missing[role]
        models, problems = resolve_all([Row(2, "lossy", str(tmp_path), None, {})])
        assert set(models) == ({"lossy"} if lost == held else set())
        assert problems == ([] if lost == held else [f"line 2 (lossy): {missing[role]}"])


def test_a_bias_of_zeros_that_one_layer_lacks_is_locked_as_none(tmp_path: Path) -> None:
    tensors = load_file(saved(tiny("opt")[0], tmp_path) / "model.safetensors")
    first, *others = [key for key in tensors if key.endswith("self_attn.q_proj.bias")]
    kept = {key: torch.zeros_like(tensor) if key in others else tensor for key, tensor in tensors.items() if key != first}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    models, problems = resolve_all([Row(2, "zeros", str(tmp_path), None, {})])
    assert problems == []
    around = models["zeros"].stacks[0].around
    assert around is not None
    assert "query_bias" not in around.missing


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
    ("changes", "sentence"),
    [
        (
            {"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}},
            "scales its rotary encoding by 'magic', which is not known",
        ),
        ({"rope_parameters": {"rope_theta": -1}}, "has the rotary base = -1, which should be a positive number"),
        ({"rope_parameters": [1]}, "should be a table"),
        ({"rope_parameters": {"rope_type": "linear"}}, "has factor = None, which should be a positive number"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1]}}, "a list short_factor of 6 numbers"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "none for 'None'"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 3.0}}, "turns 36 of 12 rows, which cannot be"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.7e308}}, "turns 156 of 12 rows, which cannot be"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 4}}, "by numbers that give no frequencies"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "mscale": "x", "mscale_all_dim": 1}}, "give no frequencies"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2, "partial_rotary_factor": 0.2}}, "give no frequencies"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1] * 6, "original_max_position_embeddings": 1}},
            "give no frequencies",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e-320}}, "give no frequencies"),
    ],
)
def test_rotary_parameters_that_cannot_be(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    model, _ = tiny("llama")
    path = saved(model, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(HeadgramError, match=sentence) as error:
        checkpoint.around("self", 0).rotary()
    assert "\n" not in str(error.value)


def test_an_odd_number_of_rows_is_no_number_of_pairs() -> None:
    with pytest.raises(HeadgramError, match="turns 3 pairs of 5 rows, which cannot be"):
        rotary_of(RotaryRule(kind="halves"), Section({}, "m"), 0, rank=5, start=0, length=None)


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
