"""Names and files as training leaves them: behind prefixes, below wrapping modules, under a key."""

from __future__ import annotations

import argparse
import collections

import pytest
import torch
from checkpoint_files import CONFIG, config_bytes, llama_tensors, single
from hostile_files import QUERY, archive, assert_refused, pickled, write
from safetensors.torch import save
from test_one_answer import inspect

from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.wrappers import plain_name
from headgram.families.registry import families
from headgram.study.manifest import read_manifest
from headgram.study.resolve import resolve_all

PLAIN = llama_tensors()
KEYS = [f"model.layers.{layer}.self_attn.{which}_proj.weight" for layer in range(2) for which in "qk"]


def assert_read(source, tensors=PLAIN, **overrides) -> None:
    with open_checkpoint(source, overrides=overrides) as checkpoint:
        for layer in range(2):
            for found, which in zip(checkpoint.qk("self", layer), "qk", strict=True):
                assert torch.equal(found.flatten(0, 1), tensors[f"model.layers.{layer}.self_attn.{which}_proj.weight"])


def renamed(new, tensors=PLAIN) -> dict[str, torch.Tensor]:
    return {new(name): tensor for name, tensor in tensors.items()}


WRAPPERS = {
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace("layers.1.", "layers.1._orig_mod."),
    "sharded": lambda name: "_fsdp_wrapped_module." + name.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "sharded and recomputed": lambda name: name.replace(
        "self_attn.", "_fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
    "a student": lambda name: f"student.{name}",
    "a policy in an actor": lambda name: f"actor.policy.{name}",
    "without the model's own prefix": lambda name: f"net.{name.removeprefix('model.')}",
    "one more of the model's own": lambda name: f"model.{name}",
    "lightning": lambda name: f"_forward_module.model.{name}",
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_any_prefix_and_any_wrapper(tmp_path, kind):
    assert_read(write(tmp_path, single(renamed(WRAPPERS[kind]))))


def test_inspect_shows_the_prefix(tmp_path):
    write(tmp_path, single(renamed(WRAPPERS["a student"])))
    assert "the model's names begin with 'student.'" in inspect(tmp_path)


def test_of_several_prefixes_the_manifest_names_one(tmp_path):
    other = llama_tensors(9)
    write(tmp_path, single(renamed(WRAPPERS["a student"]) | renamed(lambda name: f"teacher.{name}", other)))
    assert_refused(tmp_path, "several models of this type, under 'student.' and 'teacher.': set `prefix` in the manifest")
    assert_read(tmp_path, prefix="student.")
    assert_read(tmp_path, other, prefix="teacher")
    assert_refused(tmp_path, "no tensor's name begins with 'nobody.'", overrides={"prefix": "nobody"})
    manifest = tmp_path / "models.tsv"
    manifest.write_text(f"name\tsource\tprefix\na\t{tmp_path}\tstudent.\nb\t{tmp_path}\tteacher.\n")
    models, problems = resolve_all(read_manifest(manifest).rows)
    assert not problems
    assert models["a"].fingerprint != models["b"].fingerprint
    assert_read(models["b"].source, other, **models["b"].how_to_open()["overrides"])


def test_only_a_whole_model_counts(tmp_path):
    """A teacher of which a layer alone was kept is no second model."""
    part = {f"teacher.{name}": tensor.clone() for name, tensor in PLAIN.items() if "layers.0." in name}
    write(tmp_path, single(renamed(WRAPPERS["a student"]) | part))
    assert_read(tmp_path)


def test_the_familys_own_prefix_comes_first(tmp_path):
    write(tmp_path, single(PLAIN | renamed(lambda name: f"ema.{name}", llama_tensors(9))))
    assert_read(tmp_path)
    assert "not read, since the model is there without a prefix too: ema." in inspect(tmp_path)


def test_a_missing_layer_behind_a_prefix_is_named(tmp_path):
    tensors = renamed(WRAPPERS["a student"])
    del tensors["student.model.layers.1.self_attn.k_proj.weight"]
    assert_refused(write(tmp_path, single(tensors)), r"lacks tensor model\.layers\.1\.self_attn\.k_proj\.weight")


def test_no_name_of_a_family_has_modules_that_are_taken_for_wrappers():
    """Names are read without them: CohereAsr's own `transf_decoder._decoder` would be found under no name that holds it."""
    names = [name for family in families() for rule in family.stacks for name in rule.tensors().values()]
    assert [name for name in names if plain_name(name) != name] == []


def test_two_tensors_that_differ_by_wrappers_only_are_refused(tmp_path):
    write(tmp_path, single(PLAIN | {f"_orig_mod.{QUERY}": torch.zeros(32, 32)}))
    assert_refused(tmp_path, "differ in wrapping modules only")


def test_shards_keep_their_index(tmp_path):
    tensors = renamed(WRAPPERS["compiled"])
    table = {name: f"m-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    files = {f"m-{i}.safetensors": save({name: tensors[name] for name in table if f"m-{i}." in table[name]}) for i in range(2)}
    index = {"model.safetensors.index.json": str({"weight_map": table}).replace("'", '"').encode()}
    assert_read(write(tmp_path, {**files, **index, "config.json": config_bytes()}))


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module", "a.b"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_state_under_a_key(tmp_path, key, protocol):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    args = argparse.Namespace(lr=0.1, tokens=torch.zeros(2))
    content = {key: collections.OrderedDict(PLAIN), "optimizer": optimizer, "epoch": 3, "args": args, "big": 2**2000}
    write(tmp_path, {"pytorch_model.bin": pickled(content, pickle_protocol=protocol), "config.json": config_bytes()})
    assert_read(tmp_path)


@pytest.mark.parametrize("name", ["last.ckpt", "consolidated.pt", "model.pth", "mp_rank_00_model_states.pt", "weights.bin"])
def test_any_name_of_a_torch_file(tmp_path, name):
    write(tmp_path, {name: pickled({"state_dict": PLAIN}), "config.json": config_bytes()})
    assert_read(tmp_path / name)
    assert_read(tmp_path)
    write(tmp_path, {"optimizer.pt": b"", "training_args.bin": b"", "rng_state_0.pth": b""})
    assert_read(tmp_path)
    write(tmp_path, {"another.pt": b""})
    assert_refused(tmp_path, "several")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_parts_without_an_index(tmp_path, form):
    halves = [dict(list(PLAIN.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves, start=1):
        content = save(half) if form == "safetensors" else pickled(half)
        write(tmp_path, {f"model-0000{i}-of-00002.{form}": content, "config.json": config_bytes()})
    assert_read(tmp_path)
    (tmp_path / f"model-00002-of-00002.{form}").unlink()
    assert_refused(tmp_path, "lacks the file")


def test_two_states_in_one_file(tmp_path):
    content = pickled({"model": PLAIN, "ema": llama_tensors(9)})
    write(tmp_path, {"pytorch_model.bin": content, "config.json": config_bytes()})
    assert_refused(tmp_path, "under 'ema.' and 'model.'")
    assert_read(tmp_path, prefix="model")


def test_tables_that_hold_each_other_without_end(tmp_path):
    """Thirty tables of two entries, each entry the table before: a billion names."""
    nested = b"}q\x00X\x01\x00\x00\x00aNs"
    for level in range(1, 30):
        nested += (
            b"}q"
            + bytes([level])
            + b"("
            + b"".join(b"X\x01\x00\x00\x00" + c + b"h" + bytes([level - 1]) for c in (b"a", b"b"))
            + b"u"
        )
    write(tmp_path, {"pytorch_model.bin": archive(b"\x80\x02" + nested + b".", {}), "config.json": config_bytes()})
    assert_refused(tmp_path, r"levels deep|unfinished")
    itself = archive(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", {})
    write(tmp_path, {"pytorch_model.bin": itself})
    assert_refused(tmp_path, "more tables and tensors")


@pytest.mark.parametrize("changes", [{"head_dim": 16}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}])
def test_a_rank_that_the_configuration_does_not_state(tmp_path, changes):
    """A llama whose heads are wider than `hidden / heads`."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(64 if "q_proj" in name else 32, 32, generator=generator) if name in KEYS else tensor
        for name, tensor in PLAIN.items()
    }
    write(tmp_path, single(tensors))
    assert open_checkpoint(tmp_path).stacks[0].rank == changes["head_dim"]
    assert CONFIG["hidden_size"] // CONFIG["num_attention_heads"] == 8
    assert_read(tmp_path, tensors)
    write(tmp_path, single({**tensors, KEYS[1]: torch.zeros(24, 32)}))
    assert_refused(tmp_path, "the configuration and the weights disagree")
