"""Opening checkpoints, through the public door."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from headgram import HeadgramError, open_checkpoint
from tiny import llama_tensors, write_bert, write_llama, write_llama_gguf


def test_llama_shapes_and_values(tmp_path):
    checkpoint = open_checkpoint(write_llama(tmp_path / "m", dtype=torch.bfloat16))
    (stack,) = checkpoint.stacks
    assert (stack.name, stack.layers, stack.heads, stack.kv_heads, stack.rank, stack.hidden) == (
        "self",
        (0, 1, 2, 3),
        4,
        2,
        8,
        32,
    )
    assert (stack.dtype, stack.qk_bytes) == ("BF16", 4 * (4 + 2) * 8 * 32 * 2)
    tensors = llama_tensors(4, 4, 2, 8, 32, seed=0, dtype=torch.bfloat16)
    w_q, w_k = checkpoint.qk("self", 2)
    assert torch.equal(w_q, tensors["model.layers.2.self_attn.q_proj.weight"].view(4, 8, 32))
    assert torch.equal(w_k, tensors["model.layers.2.self_attn.k_proj.weight"].view(2, 8, 32))


def test_sharded_single_file_and_bert_agree(tmp_path):
    whole = open_checkpoint(write_llama(tmp_path / "whole"))
    sharded = open_checkpoint(write_llama(tmp_path / "sharded", shards=3))
    alone = open_checkpoint(tmp_path / "whole" / "model.safetensors")
    for layer in range(4):
        assert whole.digest("self", layer) == sharded.digest("self", layer) == alone.digest("self", layer)
    assert open_checkpoint(write_bert(tmp_path / "bert")).stacks[0].heads == 3


def test_only_q_and_k_are_read(tmp_path, monkeypatch):
    import headgram.checkpoints.safetensors_store as stores

    read = []
    original = stores.SafetensorsStore.read
    monkeypatch.setattr(stores.SafetensorsStore, "read", lambda self, name, cut: read.append(name) or original(self, name))
    open_checkpoint(write_llama(tmp_path / "m")).qk("self", 1)
    assert read == ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"]


def test_long_arrays_of_gguf_metadata_say_nothing(tmp_path):
    """A tokenizer's words, and what stands where a number should."""
    words = [f"word {i}" for i in range(5000)]
    numbers = [1.0] * 5000
    metadata = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": numbers, "llama.block_count": [1] * 5000}
    tensors = write_llama_gguf(tmp_path / "m.gguf", metadata=metadata)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.stacks[0].layers == (0, 1)
    _, w_k = checkpoint.qk("self", 1)
    assert torch.equal(w_k.flatten(0, 1), tensors["model.layers.1.self_attn.k_proj.weight"])


def test_gguf_in_the_other_byte_order_is_refused(tmp_path):
    write_llama_gguf(tmp_path / "m.gguf", swapped=True)
    with pytest.raises(HeadgramError, match="in the other byte order than this machine"):
        open_checkpoint(tmp_path / "m.gguf")


def test_gguf_rows_are_put_back(tmp_path):
    tensors = write_llama_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    w_q, w_k = checkpoint.qk("self", 1)
    assert torch.equal(w_q.flatten(0, 1), tensors["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(w_k.flatten(0, 1), tensors["model.layers.1.self_attn.k_proj.weight"])


def test_a_bare_file_takes_overrides(tmp_path):
    write_llama(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(HeadgramError, match=r"no config\.json"):
        open_checkpoint(tmp_path / "m")
    given = {"model_type": "llama", "heads": 4, "kv_heads": 2, "head_dim": 8}
    assert open_checkpoint(tmp_path / "m", overrides=given).stacks[0].layers == (0, 1, 2, 3)
    with pytest.raises(HeadgramError, match="unknown override 'head'"):
        open_checkpoint(tmp_path / "m", overrides={"head": 4})


def test_hub_id_in_the_local_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    blobs = write_llama(repository / "blobs")
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.location.commit == commit
    assert checkpoint.qk("self", 0)[0].shape == (4, 8, 32)
    assert open_checkpoint("org/tiny", revision=commit).stacks == checkpoint.stacks


def damage_truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def damage_wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = tensors[name][:8].clone()
    save_file(tensors, folder / "model.safetensors")


def damage_missing_layer(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def damage_config(**change):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def damage_json(folder):
    (folder / "config.json").write_text("{not json")


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "not a whole safetensors file"),
        (damage_wrong_shape, r"layer 2: tensor model\.layers\.2\.self_attn\.k_proj\.weight has shape \(8, 32\)"),
        (damage_missing_layer, r"layer 3: the checkpoint lacks tensor model\.layers\.3\.self_attn\.q_proj\.weight"),
        (damage_config(model_type="lama"), "the model type 'lama' is not known.*'llama'"),
        (damage_config(model_type=None), "names no model_type"),
        (damage_config(num_attention_heads="4"), "num_attention_heads = '4'"),
        (damage_config(num_key_value_heads=3), "disagree|cannot share"),
        (damage_json, "not valid JSON"),
        (damage_no_weights, r"no \.safetensors"),
    ],
)
def test_damage_is_one_clear_sentence(tmp_path, damage, words):
    folder = write_llama(tmp_path / "m")
    damage(folder)
    with pytest.raises(HeadgramError, match=words) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_a_nan_is_found_when_it_is_read(tmp_path):
    tensors = llama_tensors(4, 4, 2, 8, 32, seed=0)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 3] = torch.nan
    checkpoint = open_checkpoint(write_llama(tmp_path / "m", tensors=tensors))
    checkpoint.qk("self", 0)
    with pytest.raises(HeadgramError, match=r"layer 1: tensor model\.layers\.1\.self_attn\.k_proj\.weight holds a NaN"):
        checkpoint.qk("self", 1)


def test_unknown_stack_and_layer(tmp_path):
    checkpoint = open_checkpoint(write_llama(tmp_path / "m"))
    with pytest.raises(HeadgramError, match="no stack 'cross'"):
        checkpoint.qk("cross", 0)
    with pytest.raises(HeadgramError, match="no layer 9"):
        checkpoint.qk("self", 9)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors"])
def test_an_index_may_not_lead_outside(tmp_path, name):
    write_llama(tmp_path / "m", shards=2)
    shutil.copy(tmp_path / "m" / "model-00001-of-00002.safetensors", tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.layers.0.self_attn.q_proj.weight": name}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HeadgramError, match="leads out of"):
        open_checkpoint(tmp_path / "m")


def test_a_link_may_not_lead_outside(tmp_path):
    write_llama(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(HeadgramError, match="leads out of"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nowhere/at/all", "no file or folder"),
        ("nobody/nothing", "Hugging Face cache"),
        ("package:no_such_package/x", "is not installed"),
        ("package:headgram/../x.gguf", "leads out of"),
        ("package:headgram/none.gguf", "holds no"),
        ("package:os.path/x", "not a package source"),
        ("package:sys/x", "is not installed"),
        ("package:__main__/x", "is not installed"),
        *(
            (f"{beginning}/{rest}", "not a path of this system|no file or folder|holds no")
            for beginning in ("package:json", "/tmp", ".")
            for rest in ("a\0b", "x" * 5000, "x/" * 3000, "\ud800")
        ),
        ("x" * 300 + "/y", "Hugging Face cache"),
    ],
)
def test_sources_that_are_not_there(source, words):
    with pytest.raises(HeadgramError, match=words):
        open_checkpoint(source)


def with_outputs(folder):
    """A llama that has output projections too, with more columns than rows."""
    tensors = llama_tensors(2, 4, 2, 16, 32, seed=3)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.randn(32, 64) + layer
    return write_llama(folder, layers=2, rank=16, tensors=tensors), tensors


def test_values_and_outputs_are_read_by_role(tmp_path):
    folder, tensors = with_outputs(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        stack = checkpoint.stack("self")
        assert (stack.roles, stack.value_rank, stack.output_width) == (("query", "key", "value", "output"), 16, 32)
        factors = checkpoint.factors("self", 1)
        assert list(factors) == list(stack.roles)
        stored = {role: tensors[f"model.layers.1.self_attn.{role[0]}_proj.weight"] for role in factors}
        assert torch.equal(factors["value"], stored["value"].view(2, 16, 32))
        for head, written in enumerate(factors["output"]):
            assert torch.equal(written.t(), stored["output"][:, 16 * head : 16 * head + 16])
        for ours, theirs in zip(checkpoint.qk("self", 1), (factors["query"], factors["key"]), strict=True):
            assert torch.equal(ours, theirs)
        assert stack.nbytes(["value", "output"]) == 2 * (32 + 64) * 32 * 4
        assert stack.nbytes(["query", "key"]) == stack.qk_bytes


def test_digests_are_of_the_roles_that_are_asked_for(tmp_path):
    """And that of queries and keys is of their bytes alone, one after the other, as locks have it."""
    folder, tensors = with_outputs(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        for roles in (["query", "key"], ["value", "output"], ["output"]):
            names = [f"model.layers.0.self_attn.{role[0]}_proj.weight" for role in roles]
            expected = hashlib.blake2b(b"".join(tensors[name].numpy().tobytes() for name in names), digest_size=16).hexdigest()
            assert checkpoint.digest("self", 0, roles) == expected
            assert checkpoint.holds("self", 0, expected, roles)
            assert not checkpoint.holds("self", 1, expected, roles)
        assert checkpoint.digest("self", 0) == checkpoint.digest("self", 0, ["query", "key"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, r"has no role 'output' to read: layer 0: the checkpoint lacks tensor model\.layers\.0\.self_attn\.o_proj\.weight"),
        (
            {f"model.layers.{layer}.self_attn.o_proj.weight": torch.zeros(32, 31) for layer in range(4)},
            r"has no role 'output' to read: layer 0: tensor \S*o_proj\.weight has shape \(32, 31\), but 4 query",
        ),
    ],
)
def test_a_role_that_cannot_be_read_costs_no_other(tmp_path, changes, sentence):
    folder = write_llama(tmp_path / "m", tensors=llama_tensors(4, 4, 2, 8, 32, 0) | changes)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.stack("self").roles == ("query", "key", "value")
        assert list(checkpoint.factors("self", 0)) == ["query", "key", "value"]
        for ask in (checkpoint.factors, checkpoint.digest):
            with pytest.raises(HeadgramError, match=sentence) as error:
                ask("self", 0, roles=["output"])
            assert "\n" not in str(error.value)
        with pytest.raises(HeadgramError, match="unknown role 'gate'; there are: query, key, value, output"):
            checkpoint.factors("self", 0, ["gate"])


def test_a_fused_tensor_is_read_once(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8}
    (folder / "config.json").write_text(json.dumps(config))
    names = ("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight")
    save_file({names[0]: torch.randn(8, 24), names[1]: torch.randn(8, 8)}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        read = []
        monkeypatch.setattr(checkpoint, "_store", _Counting(checkpoint._store, read))
        checkpoint.factors("self", 0, ["query", "value"])
        assert read == [names[0]]
        checkpoint.factors("self", 0)
        assert read == [names[0], *names]


class _Counting:
    """A store that writes down what is read."""

    def __init__(self, store, read):
        self._store, self._read = store, read

    def read(self, name, cut=None):
        self._read.append(name)
        return self._store.read(name, cut)

    def keep(self, pieces):
        self._store.keep(pieces)
