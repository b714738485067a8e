"""Opening checkpoints, through the public door."""

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
    monkeypatch.setattr(stores.SafetensorsStore, "read", lambda self, name: read.append(name) or original(self, name))
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
    ],
)
def test_sources_that_are_not_there(source, words):
    with pytest.raises(HeadgramError, match=words):
        open_checkpoint(source)
