"""Where two sources could give one answer, one rule says which is taken, and a contradiction is refused."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import CONFIG, config_bytes, llama_tensors, safetensors_bytes, single
from hostile_files import QUERY, assert_refused, write
from safetensors.torch import save
from typer.testing import CliRunner

from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.safetensors_header import parse_header
from headgram.checkpoints.vocabulary import token_texts
from headgram.cli import app
from headgram.errors import HeadgramError
from headgram.study.lock import lock_path, read_lock
from headgram.study.options import read_options
from tiny import write_bert, write_llama, write_llama_gguf, write_manifest

FORMATS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


def inspect(source) -> str:
    done = CliRunner().invoke(app, ["inspect", str(source)])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def written(tensors: dict, form: str, folder) -> bytes:
    if form == "safetensors":
        return save(tensors)
    torch.save(tensors, folder / "made")
    return (folder / "made").read_bytes()


def two_shards(folder, form: str, index: bool = True, **homes: str):
    """The first shard holds everything, the second a zero query of the same name and a tensor of its own."""
    tensors = llama_tensors()
    names = [f"m-{i}.{form}" for i in (1, 2)]
    files = {
        names[0]: written(tensors, form, folder),
        names[1]: written({QUERY: torch.zeros_like(tensors[QUERY]), "own": torch.ones(1)}, form, folder),
    }
    table = dict.fromkeys(tensors, names[0]) | {"own": names[1]} | homes
    if index:
        files[f"{FORMATS[form]}.index.json"] = json.dumps({"weight_map": table}).encode()
    return write(folder, {**files, "config.json": config_bytes()}), tensors


@pytest.mark.parametrize("form", FORMATS)
def test_each_name_is_read_from_the_file_that_the_index_names(tmp_path, form):
    folder, tensors = two_shards(tmp_path, form)
    assert torch.equal(open_checkpoint(folder).qk("self", 0)[0].flatten(0, 1), tensors[QUERY])
    assert "from the file that the index names" in inspect(folder)
    two_shards(tmp_path, form, **{QUERY: f"m-2.{form}"})
    assert not open_checkpoint(folder).qk("self", 0)[0].any()


@pytest.mark.parametrize("form", FORMATS)
def test_a_name_that_the_index_gives_to_a_file_without_it_is_refused(tmp_path, form):
    key = "model.layers.1.self_attn.k_proj.weight"
    folder, _ = two_shards(tmp_path, form, **{key: f"m-2.{form}"})
    assert_refused(folder, rf"tensor '{key}' is in m-2\.{form}, which lacks it")


def test_what_the_index_leaves_out_is_not_there(tmp_path):
    folder, tensors = two_shards(tmp_path, "safetensors")
    table = {name: "m-1.safetensors" for name in tensors if name != QUERY}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert_refused(folder, "lacks tensor")


def test_an_index_wins_over_a_whole_file_and_safetensors_over_bin_and_inspect_says_so(tmp_path):
    folder, tensors = two_shards(tmp_path, "safetensors")
    other = llama_tensors(9)
    write(folder, {"model.safetensors": save(other), "pytorch_model.bin": written(other, "bin", tmp_path)})
    assert torch.equal(open_checkpoint(folder).qk("self", 0)[0].flatten(0, 1), tensors[QUERY])
    assert "not read, since these were found first: model.safetensors, pytorch_model.bin" in inspect(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_several_models_in_one_folder_are_refused(tmp_path, suffix):
    write(tmp_path, {f"a.{suffix}": b"", f"b.{suffix}": b"", "config.json": config_bytes()})
    assert_refused(tmp_path, "several")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_key_twice_in_json_is_refused(tmp_path, name):
    write(tmp_path, single(llama_tensors()))
    once = json.dumps({**CONFIG, "weight_map": {QUERY: "model.safetensors"}})
    (tmp_path / name).write_text(once[:-1] + ', "num_attention_heads": 2}')
    assert_refused(tmp_path, "'num_attention_heads' stands there twice")


def test_a_tensor_twice_in_a_header_is_refused(tmp_path):
    place = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    content = safetensors_bytes(f'{{"a": {place}, "a": {place}}}'.encode(), bytes(8))
    assert_refused(write(tmp_path, {"model.safetensors": content, "config.json": config_bytes()}), "'a' stands there twice")
    with pytest.raises(HeadgramError, match="'a' stands there twice"):
        parse_header(content[8:-8], len(content), "a file at the hub")


def gguf_file(path, tensors: list[str], keys: dict[str, int], name: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, name)
    for key, value in keys.items():
        writer.add_uint32(key, value)
    for tensor in tensors:
        writer.add_tensor(tensor, np.ones((8, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_parts_that_contradict_each_other_are_refused(tmp_path):
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    gguf_file(parts[0], ["a"], {"split.no": 0, "llama.block_count": 1})
    gguf_file(parts[1], ["a"], {"split.no": 1})
    assert_refused(tmp_path, "tensor 'a' is in m-00001-of-00002.gguf and in m-00002-of-00002.gguf")
    gguf_file(parts[1], ["b"], {"split.no": 1, "llama.block_count": 2})
    assert_refused(tmp_path, "states another 'llama.block_count' than the parts before it")
    parts[1].unlink()
    assert_refused(tmp_path, "lacks the file")


@pytest.mark.parametrize(
    ("once", "twice", "words"),
    [
        (b"llama.keys_b", b"llama.keys_a", "metadata 'llama.keys_a' twice"),
        (b"blk.b", b"blk.a", "not a whole GGUF file .*blk.a"),
    ],
)
def test_a_key_or_a_tensor_twice_in_a_gguf_is_refused(tmp_path, once, twice, words):
    path = tmp_path / "m.gguf"
    gguf_file(path, ["blk.a", "blk.b"], {"llama.keys_a": 1, "llama.keys_b": 2})
    path.write_bytes(path.read_bytes().replace(once, twice))
    assert_refused(path, words)


def test_a_gguf_takes_its_counts_from_itself_and_the_manifest_before_both(tmp_path):
    write_llama_gguf(tmp_path / "m.gguf")
    (tmp_path / "config.json").write_bytes(config_bytes(num_attention_heads=1))
    assert open_checkpoint(tmp_path / "m.gguf").stacks[0].heads == 4
    write_llama(tmp_path / "n", heads=4)
    given = {"heads": 8, "kv_heads": 4, "head_dim": 4}
    assert open_checkpoint(tmp_path / "n", overrides=given).stacks[0].heads == 8


def test_one_bad_row_keeps_no_other_from_being_locked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "llama")
    write_bert(tmp_path / "bert")
    shutil.copytree(tmp_path / "llama", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"")
    rows = {"one": "llama", "../x": "llama", "bad": "damaged", "gone": "nowhere", "two": "bert"}
    manifest = write_manifest(tmp_path / "models.tsv", rows)
    done = CliRunner().invoke(app, ["lock", "--manifest", str(manifest)])
    assert isinstance(done.exception, HeadgramError)
    assert all(words in str(done.exception) for words in ("3 bad entries", "(../x)", "(bad)", "(gone)"))
    assert list(read_lock(lock_path(manifest)).models) == ["one", "two"]


def packed(tensors: dict) -> dict:
    """The first query a second time, as GPTQ stores it."""
    stem = QUERY.removesuffix("weight")
    return tensors | {
        f"{stem}qweight": torch.zeros(4, 32, dtype=torch.int32),
        f"{stem}qzeros": torch.zeros(1, 4, dtype=torch.int32),
        f"{stem}scales": torch.ones(1, 32, dtype=torch.float16),
    }


GPTQ = {"quant_method": "gptq", "bits": 4}
HALF = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32, "num_hidden_layers": 2}
TWICE = {
    "a count under two names": (lambda t: t, {"n_head": 2}, {}, "num_attention_heads = 4 and n_head = 2, two names of one count"),
    "heads of the whole and of its text": (lambda t: t, {"text_config": HALF}, {}, "states 4 heads, and 2 in its text_config"),
    "a weight plain and quantised": (packed, {"quantization_config": GPTQ}, {}, "is there plain and quantised"),
    "under two prefixes of the family": (
        lambda t: t | {name.removeprefix("model."): torch.zeros_like(tensor) for name, tensor in t.items()},
        {},
        {},
        "holds the stack 'self' more than once, as layers.* and model.layers.*: save one without the others, or set `prefix`",
    ),
    "two methods of quantisation": (
        lambda t: t,
        {"quantization_config": {"quant_method": "fp8"}},
        {"hf_quant_config.json": b'{"quantization": {"quant_algo": "NVFP4"}}'},
        "states quant_method = 'fp8', and hf_quant_config.json 'modelopt'",
    ),
    "another method of quantisation in the text's part": (
        lambda t: t,
        {"quantization_config": GPTQ, "text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {},
        "states quant_method = 'gptq', and in its text_config 'fp8'",
    ),
    "two algorithms": (
        lambda t: t,
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        {"hf_quant_config.json": b'{"quantization": {"quant_algo": "NVFP4"}}'},
        "states quant_algo = 'FP8', and hf_quant_config.json 'NVFP4'",
    ),
}


@pytest.mark.parametrize("kind", TWICE)
def test_what_is_said_twice_and_differently_is_refused(tmp_path, kind):
    changed, settings, files, words = TWICE[kind]
    tensors = {name: tensor.contiguous() for name, tensor in changed(llama_tensors()).items()}
    write(tmp_path, {"model.safetensors": save(tensors), "config.json": config_bytes(**settings), **files})
    assert_refused(tmp_path, words)


def test_a_prefix_in_the_manifest_chooses_between_two_of_the_family(tmp_path):
    tensors = llama_tensors()
    other = {name.removeprefix("model."): torch.zeros_like(tensor) for name, tensor in tensors.items()}
    write(tmp_path, {"model.safetensors": save({**other, **tensors}), "config.json": config_bytes()})
    with open_checkpoint(tmp_path, overrides={"prefix": "model"}) as checkpoint:
        assert torch.equal(checkpoint.qk("self", 0)[0].flatten(0, 1), tensors[QUERY])


def test_a_key_twice_in_yaml_is_refused(tmp_path):
    write(tmp_path, {"lit_model.pth": written(llama_tensors(), "bin", tmp_path), "model_config.yaml": b"n_head: 4\nn_head: 2\n"})
    assert_refused(tmp_path, "'n_head' stands there twice")
    (tmp_path / "config.yaml").write_text("eigen:\n  topk: 8\n  topk: 4\n")
    with pytest.raises(HeadgramError, match="'topk' stands there twice"):
        read_options(tmp_path / "config.yaml", {})


def test_inspect_names_configurations_that_are_not_read(tmp_path):
    write(tmp_path, {**single(llama_tensors()), "params.json": b'{"n_heads": 2}', "model_config.yaml": b"n_head: 2"})
    assert "not read, since these were found first: model_config.yaml, params.json" in inspect(tmp_path)


def test_layers_that_nobody_declares_and_a_table_that_should_be_another_are_named(tmp_path):
    write(tmp_path, single(llama_tensors(num_hidden_layers=3)))
    assert "not read: layer 2 of the stack 'self' and what follows it" in inspect(tmp_path)
    assert "as they are stored" not in inspect(tmp_path)
    write(tmp_path, single(llama_tensors(), tie_word_embeddings=True))
    assert "not read: layer" not in inspect(tmp_path)
    assert "embedding and unembedding are read as they are stored, though the configuration says" in inspect(tmp_path)
    assert torch.equal(open_checkpoint(tmp_path).unembedding(), llama_tensors()["lm_head.weight"])


def test_the_first_tokenizer_is_taken(tmp_path):
    write(tmp_path, single(llama_tensors()) | {"vocab.txt": b"a\nb", "vocab.json": b'{"c": 0}'})
    assert token_texts(open_checkpoint(tmp_path).location) == {0: "c"}


def test_a_rotary_base_of_nothing_is_not_taken_for_one_that_is_not_stated(tmp_path):
    write(tmp_path, single(llama_tensors(), rope_theta=7, rope_parameters={"rope_type": "default", "rope_theta": 0}))
    with pytest.raises(HeadgramError, match="the rotary base = 0, which should be a positive number"):
        open_checkpoint(tmp_path).around("self", 0).rotary()
