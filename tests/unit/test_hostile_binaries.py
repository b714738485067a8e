"""Torch, GGUF and safetensors files that are malformed or damaged are read right or refused, and run nothing."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_files import config_bytes, llama_tensors, single
from hostile_files import (
    QUERY,
    QUICK,
    archive,
    assert_read_or_refused,
    assert_refused,
    pickled,
    read_all,
    tensor_pickle,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from headgram.checkpoints import gguf_check

pytestmark = pytest.mark.usefixtures("bounded_memory")


class Bomb:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_pickles_run_nothing(tmp_path):
    bomb, target = Bomb(tmp_path / "executed"), tmp_path / "pytorch_model.bin"
    (tmp_path / "config.json").write_bytes(config_bytes())
    for value in (bomb, {"a": bomb}, {**llama_tensors(), QUERY: bomb}, collections.OrderedDict(a=bomb)):
        for content in (
            pickled(value),
            pickled(value, _use_new_zipfile_serialization=False),
            pickle.dumps(value),
            archive(pickle.dumps(value, protocol=2)),
        ):
            target.write_bytes(content)
            assert_refused(tmp_path, "holds more than tensors|torch 1.6")
    assert not (tmp_path / "executed").exists()


TORCH_FILES = {
    "nothing": b"",
    "text": b"hello",
    "an empty archive": b"PK\x05\x06" + bytes(18),
    "an archive of something else": archive(b"x"),
    "compressed records": archive(tensor_pickle((2, 2), (2, 1)), {"0": bytes(10**7)}, zipfile.ZIP_DEFLATED),
    "a list": archive(pickle.dumps([1, 2], protocol=2)),
    "an enormous tensor": archive(tensor_pickle((2**20, 2**20), (2**20, 1)), {"0": bytes(16)}),
    "an expanded tensor": archive(tensor_pickle((2**20, 2**20), (0, 0)), {"0": bytes(16)}),
    "a storage that is not there": archive(tensor_pickle((2, 2), (2, 1))),
    "a storage that is too short": archive(tensor_pickle((4, 4), (4, 1), numel=16), {"0": bytes(4)}),
    "an enormous storage": archive(tensor_pickle((2, 2), (2, 1), numel=2**50), {"0": bytes(16)}),
    "a negative offset": archive(tensor_pickle((2, 2), (2, 1), offset=-8), {"0": bytes(16)}),
    "a negative stride": archive(tensor_pickle((2, 2), (-2, 1)), {"0": bytes(16)}),
    "an enormous buffer": archive(b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R\x85R."),
    "a deep pickle": archive(b"\x80\x02" + b"(" * 10**6 + b"."),
    "a truncated pickle": archive(tensor_pickle((2, 2), (2, 1))[:-20], {"0": bytes(16)}),
}


@pytest.mark.parametrize("kind", TORCH_FILES)
def test_malformed_torch_files(tmp_path, kind):
    assert_refused(write(tmp_path, {"pytorch_model.bin": TORCH_FILES[kind], "config.json": config_bytes()}))


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 1), ("embedding_length", 8), ("attention.head_count", 2), ("attention.head_count_kv", 1)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [1.0, 2.0, 3.0])
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float32))
    writer.add_tensor("blk.0.attn_k.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def gguf_bytes(tensors: int, entries: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def gguf_key(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


def gguf_tensor(*sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def gguf_array(number: int, kind: int, length: int, content: bytes) -> bytes:
    """An entry of a name of its own."""
    return struct.pack("<QQ", 8, number) + struct.pack("<IIQ", 9, kind, length) + content


GGUF_FILES = {
    "nothing": b"",
    "text": b"hello",
    "the magic alone": b"GGUF",
    "another version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "no metadata": gguf_bytes(0, 0),
    "a huge number of tensors": gguf_bytes(2**60, 0, bytes(100)),
    "a huge number of entries": gguf_bytes(0, 2**60, bytes(100)),
    "a huge string": gguf_bytes(0, 1, gguf_key(8, struct.pack("<Q", 2**62))),
    "a huge array": gguf_bytes(0, 1, gguf_key(9, struct.pack("<IQ", 0, 2**62))),
    "a huge array of strings": gguf_bytes(0, 1, gguf_key(9, struct.pack("<IQ", 8, 2**62))),
    "a long array": gguf_bytes(0, 1, gguf_key(9, struct.pack("<IQ", 0, 2**23) + bytes(2**23))),
    "many short arrays": gguf_bytes(0, 100, b"".join(gguf_array(i, 0, 4096, bytes(4096)) for i in range(100))),
    "many short arrays of strings": gguf_bytes(0, 20, b"".join(gguf_array(i, 8, 4096, bytes(8 * 4096)) for i in range(20))),
    "many entries": gguf_bytes(0, 10_000, b"".join(gguf_array(i, 0, 0, b"") for i in range(10_000))),
    "many tensors": gguf_bytes(50_000, 0, gguf_tensor(1) * 50_000),
    "arrays in arrays": gguf_bytes(0, 1, gguf_key(9, struct.pack("<IQ", 9, 1) * 10_000)),
    "an unknown type": gguf_bytes(0, 1, gguf_key(77, bytes(8))),
    "too many axes": gguf_bytes(1, 0, struct.pack("<QI", 0, 2**31) + bytes(100)),
    "a huge tensor": gguf_bytes(1, 0, gguf_tensor(2**40, 2**40) + bytes(100)),
    "a tensor that overflows": gguf_bytes(1, 0, gguf_tensor(2**32, 2**32) + bytes(100)),
    "a tensor past the end": gguf_bytes(1, 0, gguf_tensor(8, 8, offset=2**50) + bytes(100)),
    "an unknown tensor type": gguf_bytes(1, 0, gguf_tensor(8, kind=999) + bytes(100)),
    "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 2**60, 0),
}


@pytest.mark.parametrize("kind", GGUF_FILES)
def test_malformed_gguf_files(tmp_path, kind):
    (tmp_path / "model.gguf").write_bytes(GGUF_FILES[kind])
    assert_refused(tmp_path / "model.gguf")


def test_a_split_gguf_model_of_no_parts(tmp_path, good_gguf):
    for name in ("a-00001-of-00000.gguf", "a-00001-of-99999.gguf"):
        (tmp_path / name).write_bytes(good_gguf)
    read_all(tmp_path / "a-00001-of-00000.gguf")
    assert_refused(tmp_path / "a-00001-of-99999.gguf", "lacks the file")


def damaged(content: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
    changed = bytearray(content)
    for at, value in changes:
        changed[at % len(content)] = value
    return bytes(changed[:cut])


damage = {
    "changes": st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4),
    "cut": st.none() | st.integers(0, 2000),
}


@given(**damage)
@QUICK
def test_damaged_gguf_files(tmp_path, good_gguf, changes, cut):
    (tmp_path / "model.gguf").write_bytes(damaged(good_gguf, changes, cut))
    assert_read_or_refused(tmp_path / "model.gguf")


@given(**damage)
@QUICK
def test_damaged_safetensors_files(tmp_path, changes, cut):
    files = single(llama_tensors(hidden_size=8, num_hidden_layers=1), hidden_size=8, num_hidden_layers=1)
    write(tmp_path, files | {"model.safetensors": damaged(files["model.safetensors"], changes, cut)})
    assert_read_or_refused(tmp_path)


@given(**damage)
@QUICK
def test_damaged_torch_files(tmp_path, changes, cut):
    tensors = {name: tensor for name, tensor in llama_tensors(hidden_size=8, num_hidden_layers=1).items() if "self_attn" in name}
    content = damaged(pickled(tensors), changes, cut)
    write(tmp_path, {"pytorch_model.bin": content, "config.json": config_bytes(hidden_size=8, num_hidden_layers=1)})
    assert_read_or_refused(tmp_path)


def test_the_gguf_walk_agrees_with_the_library(tmp_path, good_gguf):
    (tmp_path / "model.gguf").write_bytes(good_gguf)
    gguf_check.check_header(tmp_path / "model.gguf")
    read_all(tmp_path / "model.gguf")
