"""Files made to harm: each is refused in one sentence; nothing in it runs, and time and memory stay bounded."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from checkpoint_files import config_bytes, llama_tensors, safetensors_bytes, single
from hostile_files import QUERY, QUICK, assert_read_or_refused, assert_refused, json_values, read_all, write
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from headgram.checkpoints.safetensors_header import PREFIX, header_length, parse_header
from headgram.checkpoints.weight_files import choose_weights
from headgram.errors import HeadgramError

entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    },
)


pytestmark = pytest.mark.usefixtures("bounded_memory")


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "no JSON": b"{{{",
    "an array": b"[]",
    "nothing": b"",
    "not UTF-8": b'{"\xff": 1}',
    "an entry that is no object": {"a": 1},
    "an unknown type": {"a": entry("F99")},
    "a shape that is no array": {"a": entry(shape="2")},
    "a negative size": {"a": entry(shape=[-2])},
    "a fractional size": {"a": entry(shape=[2.0])},
    "a huge shape": {"a": entry(shape=[2**40, 2**40], offsets=[0, 2**82])},
    "a shape that overflows": {"a": entry(shape=[2**32, 2**32, 4], offsets=[0, 0])},
    "offsets outside": {"a": entry(offsets=[0, 800], shape=[200])},
    "offsets in reverse": {"a": entry(offsets=[8, 0])},
    "negative offsets": {"a": entry(offsets=[-8, 0])},
    "overlapping tensors": {"a": entry(), "b": entry(offsets=[4, 12])},
    "a gap": {"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[1], offsets=[8, 12])},
    "bytes left over": {"a": entry(shape=[1], offsets=[0, 4])},
    "one offset": {"a": entry(offsets=[0])},
    "deep nesting": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_malformed_safetensors_headers(tmp_path, kind):
    content = safetensors_bytes(HEADERS[kind], bytes(12))
    assert_refused(write(tmp_path, {"model.safetensors": content, "config.json": config_bytes()}))
    with pytest.raises(HeadgramError):
        parse_header(content[PREFIX:-12], len(content), "a file at the hub")


@pytest.mark.parametrize("length", [0, 1, 50, 100_000_001, 2**63, 2**64 - 1])
def test_header_lengths(tmp_path, length):
    content = struct.pack("<Q", length) + b"{}" + bytes(20)
    assert_refused(write(tmp_path, {"model.safetensors": content, "config.json": config_bytes()}), "not a whole safetensors file")
    with pytest.raises(HeadgramError, match="header claims"):
        header_length(content[:8], len(content), "a file")


def test_every_truncation(tmp_path):
    content = save({"a": torch.ones(3)})
    for size in range(len(content)):
        assert_refused(
            write(tmp_path, {"model.safetensors": content[:size], "config.json": config_bytes()}), "whole safetensors file"
        )


@given(st.binary(max_size=200), st.integers(0, 2**64))
@QUICK
def test_any_header_is_read_or_refused(header, size):
    try:
        places = parse_header(header, size, "a file")
    except HeadgramError:
        return
    assert all(0 <= place.start <= place.stop <= size for place in places.values())


@given(st.dictionaries(st.text(max_size=5), entries | json_values, max_size=4), st.integers(0, 60))
@QUICK
def test_any_header_of_json_is_read_or_refused(header, data):
    text = json.dumps(header).encode()
    try:
        places = parse_header(text, PREFIX + len(text) + data, "a file")
    except HeadgramError:
        return
    assert sum(place.stop - place.start for place in places.values()) == data


@given(json_values | st.fixed_dictionaries({"weight_map": json_values | st.dictionaries(st.text(max_size=5), json_values)}))
@QUICK
def test_any_index_is_read_or_refused(index):
    try:
        found = choose_weights(
            {"model.safetensors.index.json"}, lambda name: index if isinstance(index, dict) else {}, "a folder"
        )
    except HeadgramError:
        return
    assert all(name.endswith(".safetensors") for name in found)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd.safetensors", "../secret.safetensors", "a/../../secret.safetensors", "absent.safetensors", "config.json", "",
        "\x1b[31m.safetensors", "a\n.safetensors", "link.safetensors", "~/secret.safetensors", "pipe.safetensors", "x" * 5000,
    ],
)  # fmt: skip
def test_names_in_an_index(tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes(save(llama_tensors()))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    index = json.dumps({"weight_map": {QUERY: name}}).encode()
    assert_refused(
        write(folder, {"model.safetensors.index.json": index, "config.json": config_bytes()}), "leads out|lacks|which is no"
    )


def test_an_index_with_too_many_files(tmp_path):
    index = {"weight_map": {str(i): f"{i}.safetensors" for i in range(20_000)}}
    assert_refused(write(tmp_path, {"model.safetensors.index.json": json.dumps(index).encode()}), "20000 files")


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"", b"[]", b'"x"', b'{"a": ' + b"9" * 9999 + b"}"]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(tmp_path, content, name):
    assert_refused(write(tmp_path, single(llama_tensors()) | {name: content}), "JSON")


def test_json_that_is_too_large(tmp_path):
    write(tmp_path, single(llama_tensors()))
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # takes no space on disk
    assert_refused(tmp_path, "larger than")


def test_a_config_that_leads_out(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, {"model.safetensors": save(llama_tensors())})
    (tmp_path / "config.json").write_bytes(config_bytes())
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert_refused(folder, "leads out")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 8}, {"num_attention_heads": 3}, {"num_key_value_heads": 4}, {"hidden_size": 64}, {"head_dim": 16},
        {"num_hidden_layers": 3}, {"num_hidden_layers": 2**31}, {"num_attention_heads": -1}, {"num_attention_heads": 2.5},
        {"num_attention_heads": True}, {"num_attention_heads": None}, {"num_attention_heads": "4"},
        {"num_attention_heads": [4] * 10**5},
        {"hidden_size": 2**31 - 1}, {"model_type": None}, {"model_type": ["llama"]}, {"model_type": "x" * 10**6},
        {"quantization_config": {"quant_method": ["awq"]}}, {"quantization_config": {"quant_method": "x" * 10**6}},
    ],
)  # fmt: skip
def test_configurations_that_disagree_with_the_tensors(tmp_path, changes):
    assert_refused(write(tmp_path, single(llama_tensors(), **changes)))


@pytest.mark.parametrize("model_type", ["kimi_linear", "embedding_gemma2_text"])
def test_a_configuration_of_which_no_layer_has_attention(tmp_path, model_type):
    kinds = {"layer_types": ["linear_attention"] * 2}
    write(tmp_path, {**single(llama_tensors()), "config.json": config_bytes(model_type=model_type, **kinds)})
    assert_refused(tmp_path, "should hold attention weights, but this one has none")


def test_code_that_a_config_names_is_ignored(tmp_path):
    """`auto_map` makes transformers import a file of the checkpoint."""
    bomb = f"import pathlib; pathlib.Path({str(tmp_path / 'executed')!r}).touch()\n".encode()
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling.Model")
    write(
        tmp_path,
        single(llama_tensors(), auto_map=names, trust_remote_code=True) | {"modeling.py": bomb, "configuration.py": bomb},
    )
    read_all(tmp_path)
    assert not (tmp_path / "executed").exists()


@given(
    st.dictionaries(
        st.sampled_from(["model_type", "hidden_size", "num_hidden_layers", "head_dim", "quantization_config"]), json_values
    )
)
@QUICK
def test_any_configuration_is_read_or_refused(tmp_path, changes):
    assert_read_or_refused(write(tmp_path, single(llama_tensors(), **changes)))
