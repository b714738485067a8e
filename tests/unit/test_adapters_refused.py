"""Adapters that cannot be merged are refused in one sentence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapter_files import KINDS, adapter, base, change, edited
from safetensors.torch import load_file, save_file

from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError

REFUSED = {
    "another kind": ({"peft_type": "IA3"}, "peft_type = 'IA3': headgram reads LoRA and DoRA; if peft can merge it, do so"),
    "no kind": ({"peft_type": None}, "peft_type = None"),
    "acts on some tokens": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "repeats layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "blocks": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "an unknown variant": ({"use_newlora": True}, "use_newlora"),
    "an unknown configuration": ({"new_config": {"a": 1}}, "new_config"),
    "a changed base": ({"init_lora_weights": "pissa"}, "changes the base before training"),
    "no rank": ({"r": None}, "r = None"),
    "no alpha": ({"lora_alpha": "many"}, "lora_alpha = 'many'"),
    "an endless alpha": ({"lora_alpha": 10**400}, "lora_alpha"),
    "a text for a truth value": ({"use_rslora": "false"}, "use_rslora = 'false', which should be true or false"),
    "a number for a truth value": ({"use_dora": 0}, "use_dora = 0, which should be true or false"),
    "another rank": ({"r": 5}, "have rank 4, but adapter_config.json says 5"),
    "no lengths": ({"use_dora": True}, "no lora_magnitude_vector"),
    "costly patterns": ({"alpha_pattern": {"(a+)+b": 2}}, "costly"),
    "broken patterns": ({"alpha_pattern": {"(": 2}}, "costly"),
    "patterns that are none": ({"rank_pattern": [1]}, "rank_pattern"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_that_are_refused(pair, kind):
    settings, sentence = REFUSED[kind]
    change(pair / "adapter", **settings)
    with pytest.raises(HeadgramError, match=sentence):
        open_checkpoint(pair / "adapter")


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


DAMAGE = {
    "another base": ({f"{KEY}.lora_B.weight": torch.ones(30, 4)}, "do not fit its shape"),
    "ranks that differ": ({f"{KEY}.lora_B.weight": torch.ones(32, 3)}, "do not fit its shape"),
    "one factor": ({f"{KEY}.lora_B.weight": None}, "no lora_B of 'model.layers.0.self_attn.q_proj'"),
    "another part": ({f"{KEY}.lora_E": torch.ones(4)}, "lora_E"),
    "two adapters": ({f"{KEY}.lora_A.other.weight": torch.ones(4, 32)}, "twice|several adapters"),
    "a layer that is not there": (
        {f"{KEY.replace('0', '7')}.lora_A.weight": torch.ones(4, 32)},
        "the base has no such module: .*`base` in the manifest",
    ),
    "integers": ({f"{KEY}.lora_B.weight": torch.ones(32, 4, dtype=torch.int8)}, "stored as I8"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_factors_that_are_refused(pair, kind):
    edits, sentence = DAMAGE[kind]
    path = pair / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(path) | edits).items() if tensor is not None}
    save_file(tensors, path)
    with pytest.raises(HeadgramError, match=sentence):
        open_checkpoint(pair / "adapter")


def test_a_weight_that_is_replaced_and_changed_is_refused(pair):
    edited(pair / "adapter" / "adapter_model.safetensors", **{f"{KEY}.modules_to_save.weight": torch.zeros(32, 32)})
    with pytest.raises(HeadgramError, match="both replaces and changes"):
        open_checkpoint(pair / "adapter")


def test_a_nan_in_a_factor_is_refused(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{KEY}.lora_B.weight"][0, 0] = math.nan
    save_file(tensors, path)
    with open_checkpoint(pair / "adapter") as checkpoint, pytest.raises(HeadgramError, match="NaN"):
        checkpoint.qk("self", 0)


def test_an_unmerged_state_dict_without_settings_is_refused(tmp_path):
    model = adapter(tmp_path, base(tmp_path))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(HeadgramError, match=r"not merged, and no adapter_config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("lost", ["k_proj", "proj"])
def test_an_unmerged_state_dict_that_lost_factors_is_not_read_as_its_base(tmp_path, lost):
    model = adapter(tmp_path, base(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if not (lost in name and ".lora_" in name)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(HeadgramError, match=r"base_layer of 'model\.layers\.0\.self_attn\..*_proj', but not the factors"):
        open_checkpoint(tmp_path)


def test_names_that_anchored_patterns_cannot_be_held_against_are_refused(tmp_path):
    """A state dict of the inner model: whether something stands before its names cannot be known."""
    model = adapter(tmp_path, base(tmp_path), **KINDS["patterns"])
    (tmp_path / "adapter_model.safetensors").unlink()
    save_file(
        {name: tensor.clone() for name, tensor in model.base_model.model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(HeadgramError, match=r"without 'base_model\.model\.'"):
        open_checkpoint(tmp_path)
    change(tmp_path, alpha_pattern={"o_proj": 32}, rank_pattern={"q_proj": 2, "1.self_attn.k_proj": 3})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.stacks[0].dtype == "F32+LoRA"


STRANGE = [
    None, True, -1, 0, 10**400, math.inf, "", "\0", "a" * 5000, "../../etc", [], [[]], {}, {"(a|a)*$": 1}, {"": -1}, {"q": "x"},
]  # fmt: skip


SETTINGS = [
    "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "use_rslora", "use_dora", "init_lora_weights", "modules_to_save", "target_parameters", "layer_replication", "new_config",
]  # fmt: skip


def refusal(source: Path) -> str:
    """The sentence that a source is refused with; empty if it is read."""
    try:
        with open_checkpoint(source) as checkpoint:
            checkpoint.qk("self", 0)
    except HeadgramError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", SETTINGS)
def test_strange_settings_are_read_or_refused_in_a_sentence(pair, name):
    for value in STRANGE:
        change(pair / "adapter", **{name: value})
        sentence = refusal(pair / "adapter")
        assert "\n" not in sentence
        assert len(sentence) < 800
