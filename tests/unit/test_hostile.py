"""Files made to harm: each is refused in one sentence; nothing in it runs, and time and memory stay bounded."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import config_bytes, llama_tensors, safetensors_bytes, single
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from headgram.checkpoints import gguf_check
from headgram.checkpoints.checkpoint import open_checkpoint
from headgram.checkpoints.safetensors_header import PREFIX, header_length, parse_header
from headgram.checkpoints.weight_files import choose_weights
from headgram.errors import HeadgramError

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def bounded_memory():
    """A file that asks for much more than it holds fails here, instead of filling the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read_all(source: Path, overrides: dict | None = None) -> None:
    with open_checkpoint(source, overrides=overrides) as checkpoint:
        for stack in checkpoint.stacks:
            for layer in stack.layers:
                checkpoint.qk(stack.name, layer)
                checkpoint.digest(stack.name, layer)


def assert_refused(source: Path, sentence: str = ".", overrides: dict | None = None) -> None:
    with pytest.raises(HeadgramError, match=sentence) as caught:
        read_all(source, overrides)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    },
)


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


class Bomb:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def pickled(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive(pickle_bytes: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Torch's zip format around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle_bytes)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
        for name, content in (storages or {}).items():
            file.writestr(f"archive/data/{name}", content)
    return buffer.getvalue()


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


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], numel: int = 4, offset: int = 0) -> bytes:
    """A pickled `{QUERY: tensor}` over storage `0`, with any size and stride."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({QUERY: Tensor()})
    return buffer.getvalue()


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


def assert_read_or_refused(path: Path) -> None:
    try:
        read_all(path)
    except HeadgramError:
        return


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


@given(
    st.dictionaries(
        st.sampled_from(["model_type", "hidden_size", "num_hidden_layers", "head_dim", "quantization_config"]), json_values
    )
)
@QUICK
def test_any_configuration_is_read_or_refused(tmp_path, changes):
    assert_read_or_refused(write(tmp_path, single(llama_tensors(), **changes)))


def test_the_gguf_walk_agrees_with_the_library(tmp_path, good_gguf):
    (tmp_path / "model.gguf").write_bytes(good_gguf)
    gguf_check.check_header(tmp_path / "model.gguf")
    read_all(tmp_path / "model.gguf")
