"""Adapters as sources, against peft's own merge."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
from adapter_files import KINDS, adapter, base, change, edited
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from typer.testing import CliRunner

from headgram.checkpoints.adapted_store import merge
from headgram.checkpoints.known import open_checkpoint
from headgram.cli import app
from headgram.errors import HeadgramError
from headgram.study.lock import changes
from headgram.study.manifest import read_manifest
from headgram.study.resolve import resolve_all


def assert_same(source, judge, roles: tuple[str, ...] = ("query", "key", "value", "output"), **options) -> None:
    """A source holds the weights of a model, by role."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    state = judge.state_dict()
    with open_checkpoint(source, **options) as checkpoint:
        for layer in range(2):
            found = checkpoint.factors("self", layer, roles)
            for role in roles:
                if isinstance(judge, GPT2LMHeadModel):
                    expected = gpt2_factors(state, layer)[role]
                else:
                    weight = state[f"model.layers.{layer}.self_attn.{names[role]}.weight"]
                    expected = (weight.T if role == "output" else weight).unflatten(0, (-1, 8))
                torch.testing.assert_close(found[role], expected.to(found[role].dtype), rtol=1e-5, atol=1e-5)


def gpt2_factors(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    fused = state[f"transformer.h.{layer}.attn.c_attn.weight"].T.unflatten(0, (3, 4, 8))
    output = state[f"transformer.h.{layer}.attn.c_proj.weight"].unflatten(0, (4, 8))
    return dict(zip(("query", "key", "value", "output"), (*fused, output), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges_it(tmp_path, kind):
    model = adapter(tmp_path / "adapter", base(tmp_path / "base"), **KINDS[kind])
    assert_same(tmp_path / "adapter", model.merge_and_unload())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("modules", [["c_attn", "attn.c_proj"], ["attn.c_proj"], ["c_attn", "attn.c_proj", "lm_head"]])
@pytest.mark.parametrize("stated", [True, False, None])
def test_weights_that_are_stored_in_by_out(tmp_path, settings, modules, stated):
    """GPT-2's, of which `attn.c_proj` is square: peft notices by the module, and states what the last module was."""
    model = adapter(
        tmp_path / "adapter", base(tmp_path / "base", "gpt2"), target_modules=modules, fan_in_fan_out=True, **settings
    )
    if stated is not None:
        change(tmp_path / "adapter", fan_in_fan_out=stated)
    assert_same(tmp_path / "adapter", model.merge_and_unload())


@pytest.mark.parametrize("kind", ["plain", "DoRA", "whole modules", "patterns"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_unmerged_state_dicts(tmp_path, kind, form):
    """A model that was saved with its factors beside its weights."""
    model = adapter(tmp_path, base(tmp_path), **KINDS[kind])
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if form == "bin":
        torch.save({"model": state}, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    assert_same(tmp_path, model.merge_and_unload())


def test_the_sum_is_made_in_float64_and_given_as_float32(tmp_path):
    """Rounded to the base's 16 bits, most of a small change would be lost."""
    adapter(tmp_path / "adapter", base(tmp_path / "base", dtype=torch.bfloat16), lora_alpha=0.001)
    name = "model.layers.0.self_attn.q_proj"
    weight = load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"]
    a, b = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors")[f"base_model.model.{name}.lora_{w}.weight"] for w in "AB"
    )
    exact = weight.double() + 0.001 / 4 * (b.double() @ a.double())
    with open_checkpoint(tmp_path / "adapter") as checkpoint:
        assert checkpoint.stacks[0].dtype == "BF16+LoRA"
        assert torch.equal(checkpoint.qk("self", 0)[0].flatten(0, 1), exact.float())
    assert merge(torch.eye(2, dtype=torch.float64), b[:2, :1], a[:1, :2], 1.0).dtype == torch.float64


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight, left, right, lengths = torch.randn(7, 5), torch.randn(7, 2), torch.randn(2, 5), torch.rand(7)
    whole = merge(weight, left, right, 0.3, lengths)
    monkeypatch.setattr("headgram.checkpoints.adapted_store._BLOCK", 10)
    torch.testing.assert_close(merge(weight, left, right, 0.3, lengths), whole)


def test_a_base_under_another_prefix(tmp_path):
    """The adapter was made with the head on top, the base was saved without, or the other way round."""
    model = adapter(tmp_path / "adapter", base(tmp_path / "base"))
    judge = model.merge_and_unload()
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "base" / "model.safetensors")
    assert_same(tmp_path / "adapter", judge)
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "base" / "model.safetensors")
    assert_same(tmp_path / "adapter", judge)


def test_a_quantised_base(tmp_path):
    """As QLoRA trains: factors beside a base in 8-bit floats."""
    adapter(tmp_path / "adapter", base(tmp_path / "base"))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    judge = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name in [name for name in tensors if "self_attn" in name and name.endswith("weight")]:
        stored = (tensors[name] * 8).to(torch.float8_e4m3fn)
        judge.get_parameter(name).data = stored.float() / 8
        tensors |= {name: stored, f"{name}_scale_inv": torch.tensor([[0.125]])}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    change(tmp_path / "base", "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert_same(tmp_path / "adapter", peft.PeftModel.from_pretrained(judge, tmp_path / "adapter").merge_and_unload())


def test_the_base_may_be_given(pair):
    shutil.move(pair / "base", pair / "moved")
    with pytest.raises(HeadgramError, match=r"needs its base '.*base'.*no file or folder"):
        open_checkpoint(pair / "adapter")
    change(pair / "adapter", base_model_name_or_path=None)
    with pytest.raises(HeadgramError, match="names no base: set `base` in the manifest"):
        open_checkpoint(pair / "adapter")
    moved = {"base": str(pair / "moved")}
    assert open_checkpoint(pair / "adapter" / "adapter_model.safetensors", overrides=moved).stacks[0].heads == 4
    with pytest.raises(HeadgramError, match="is no adapter"):
        open_checkpoint(pair / "moved", overrides=moved)
    with pytest.raises(HeadgramError, match="is an adapter itself"):
        open_checkpoint(pair / "adapter", overrides={"base": str(pair / "adapter")})


def test_inspect_names_both(pair):
    done = CliRunner().invoke(app, ["inspect", str(pair / "adapter")])
    assert f"a LoRA adapter, merged into {pair / 'base'}" in "".join(done.output.splitlines())


def locked(pair, name: str = "adapter"):
    manifest = pair / "models.tsv"
    manifest.write_text(f"name\tsource\tbase\none\t{pair / 'adapter'}\t{pair / 'base'}\n")
    models, problems = resolve_all(read_manifest(manifest).rows)
    assert not problems
    return models["one"]


def digest_of(entry) -> str:
    return entry.stacks[0].circuits["qk"].digests[0]


def test_the_lock_covers_base_and_adapter(pair):
    """Factors, scale and base each change fingerprint and digests; each file is noticed before anything is read."""
    first = locked(pair)
    assert [file.name for file in first.files] == [
        "adapter_model.safetensors", "base:model.safetensors", "adapter_config.json", "base:config.json",
    ]  # fmt: skip
    assert open_checkpoint(**first.how_to_open()).holds("self", 0, digest_of(first))
    assert not changes("one", first)

    def negated(path, name):
        tensors = load_file(path)
        save_file(tensors | {name: -tensors[name]}, path)

    key = "model.layers.0.self_attn.q_proj"
    edits = [
        lambda: negated(pair / "adapter" / "adapter_model.safetensors", f"base_model.model.{key}.lora_A.weight"),
        lambda: negated(pair / "base" / "model.safetensors", f"{key}.weight"),
        lambda: change(pair / "adapter", lora_alpha=7),
    ]
    for edit in edits:
        edit()
        second = locked(pair)
        assert second.fingerprint != first.fingerprint
        assert digest_of(second) != digest_of(first)
        assert changes("one", first)
        first = second


def test_a_head_that_is_tied_in_the_base_keeps_nothing_else_from_being_read(pair):
    """An adapter of `lm_head`, which a base with tied tables does not store."""
    edited(pair / "base" / "model.safetensors", **{"lm_head.weight": None})
    head = "base_model.model.lm_head"
    factors = {f"{head}.lora_A.weight": torch.ones(4, 32), f"{head}.lora_B.weight": torch.ones(16, 4)}
    edited(pair / "adapter" / "adapter_model.safetensors", **factors)
    with open_checkpoint(pair / "adapter") as checkpoint:
        assert checkpoint.stacks[0].dtype == "F32+LoRA"
        with pytest.raises(HeadgramError, match="under no name of its own"):
            checkpoint._store.dtype("lm_head.weight")


def test_modules_that_are_saved_whole_under_every_name(pair):
    """Peft has called them in several ways."""
    key = "model.layers.1.self_attn.k_proj"
    whole = torch.full((16, 32), 3.0)
    path = pair / "adapter" / "adapter_model.safetensors"
    for which in "AB":
        edited(path, **{f"base_model.model.{key}.lora_{which}.weight": None})
    edited(path, **{f"base_model.model.{key}.original_module.weight": torch.zeros(16, 32)})
    for name in ("weight", "modules_to_save.weight", "modules_to_save.default.weight"):
        edited(path, **{f"base_model.model.{key}.{name}": whole})
        with open_checkpoint(pair / "adapter") as checkpoint:
            assert torch.equal(checkpoint.qk("self", 1)[1].flatten(0, 1), whole)
        edited(path, **{f"base_model.model.{key}.{name}": None})
