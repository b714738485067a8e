"""Rotary encoding in odd configurations: scalings, bases, shares of the rows, and parameters that cannot be."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import WAVES, residuals, saved, tiny

from headgram import HeadgramError, open_checkpoint
from headgram.checkpoints.dimensions import Section
from headgram.checkpoints.rotary import planes_of
from headgram.families.around import RotaryRule, rule_of
from headgram.families.registry import families
from headgram.proofs.prove import TOLERANCE, quiet

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
            said = planes_of(rule, Section({**rest, "rope_parameters": stated}, model_type), 0, 64, 0, None)
            unsaid = planes_of(rule, Section(rest, model_type).of(family.stacks[0]), 0, 64, 0, None)
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
                found = planes_of(rule, Section({**rest, "rope_parameters": stated}, model_type), 0, rank, 0, None)
                assert found is not None
                if len(found.frequencies) != len(model.rotary_emb.inv_freq):
                    pytest.fail(f"{model_type}: {len(found.frequencies)} planes, the model {len(model.rotary_emb.inv_freq)}")
                compared.add(rule.share)
    assert compared == {True, None}


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
        ({"rope_parameters": {"rope_theta": 10**400}}, "has the rotary base = 1000000"),
        ({"rope_parameters": {"rope_theta": math.nan}}, "has the rotary base = nan"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [10**400] * 6}}, "has short_factor = 1000000"),
    ],
)
def test_rotary_parameters_that_cannot_be(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    model, _ = tiny("llama")
    path = saved(model, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(HeadgramError, match=sentence) as error:
        checkpoint.around("self", 0).rotary()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [1e308, 10**400, math.inf])
def test_a_scale_that_no_number_is(tmp_path: Path, share: float) -> None:
    """The scale of YaRN's attention is a square of what a configuration states."""
    model, _ = tiny("deepseek_v3")
    path = saved(model, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": share}
    path.write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(HeadgramError, match="mscale_all_dim|give no scale"):
        _ = checkpoint.around("self", 0).scale


def test_an_odd_number_of_rows_is_no_number_of_pairs() -> None:
    with pytest.raises(HeadgramError, match="turns 3 pairs of 5 rows, which cannot be"):
        planes_of(RotaryRule(kind="halves"), Section({}, "m"), 0, rank=5, start=0, length=None)
