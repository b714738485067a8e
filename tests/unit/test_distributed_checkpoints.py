"""Distributed checkpoints of torch: what torch writes and reads, without its unpickling."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_files import CONFIG, config_bytes, llama_tensors
from hostile_files import assert_refused, write
from test_one_answer import inspect
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from headgram.checkpoints.known import open_checkpoint
from headgram.study.manifest import Row
from headgram.study.resolve import resolve

PLAIN = llama_tensors()
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def saved(folder, state: dict):
    with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return write(folder, {"config.json": config_bytes()})


def in_pieces(folder, tensors: dict[str, torch.Tensor], cuts: dict[str, list[tuple[slice, ...]]], changed=lambda table: None):
    """As ranks write their shards: blocks of tensors in two files, with torch's own classes and writer."""
    described, places = {}, {}
    files = {f"__{rank}_0.distcp": io.BytesIO() for rank in range(2)}
    for name, tensor in tensors.items():
        chunks = []
        for i, cut in enumerate(cuts.get(name, [tuple(slice(0, size) for size in tensor.shape)])):
            block = tensor[cut].clone()
            offsets = torch.Size(part.start for part in cut)
            file = f"__{i % 2}_0.distcp"
            start = files[file].tell()
            torch.save(block, files[file])
            chunks.append(ChunkStorageMetadata(offsets, block.shape))
            place = _StorageInfo(file, start, files[file].tell() - start)
            places[MetadataIndex(name, offsets)] = place
        described[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    table = Metadata(described, storage_data=places)
    changed(table)
    content = {name: file.getvalue() for name, file in files.items()}
    return write(folder, {**content, ".metadata": pickle.dumps(table), "config.json": config_bytes()})


def assert_read(source, **options) -> None:
    with open_checkpoint(source, **options) as checkpoint:
        assert checkpoint.location.format == "distcp"
        for layer in range(CONFIG["num_hidden_layers"]):
            for found, which in zip(checkpoint.qk("self", layer), "qk", strict=True):
                assert torch.equal(found.flatten(0, 1), PLAIN[f"model.layers.{layer}.self_attn.{which}_proj.weight"])


@pytest.mark.parametrize("key", ["model", "app.model", None])
def test_what_torch_saves(tmp_path, key):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3), "step": 7}}, "param_groups": [{"lr": 0.1}]}
    state = {key: PLAIN, "optim": optimizer, "epoch": 3} if key else dict(PLAIN)
    saved(tmp_path, state)
    assert_read(tmp_path)
    assert "1 weight file(s)" not in inspect(tmp_path)


def blocks(rows: int, columns: int) -> list[tuple[slice, slice]]:
    return [(slice(i, i + 8), slice(j, j + 16)) for i in range(0, rows, 8) for j in range(0, columns, 16)]


def test_pieces_of_several_ranks(tmp_path):
    """Torch's own reader takes the same folder for the same tensors."""
    cuts = {name: blocks(*tensor.shape) for name, tensor in PLAIN.items() if "self_attn" in name}
    in_pieces(tmp_path, PLAIN, cuts)
    judge = {name: torch.zeros_like(tensor) for name, tensor in PLAIN.items()}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(judge, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(judge[name], tensor) for name, tensor in PLAIN.items())
    assert_read(tmp_path)


def test_the_lock_covers_table_and_files_and_the_digest_is_of_the_numbers(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, pieces = (in_pieces(tmp_path / "a", PLAIN, {}), in_pieces(tmp_path / "b", PLAIN, {QUERY: blocks(32, 32)}))
    locked = [resolve(Row(1, "m", str(folder), None, {})) for folder in (whole, pieces)]
    assert [file.name for file in locked[0].files] == ["__0_0.distcp", "__1_0.distcp", ".metadata", "config.json"]
    assert locked[0].stacks == locked[1].stacks


def query(table: Metadata) -> TensorStorageMetadata:
    return table.state_dict_metadata[QUERY]


def sized(table: Metadata, *sizes: int) -> None:
    query(table).size = torch.Size(sizes)


def sized_norm(table: Metadata, *sizes: int) -> None:
    """Of a norm, whose bytes are locked before its shape matters."""
    norm = table.state_dict_metadata[NORM]
    norm.size, norm.chunks = torch.Size(sizes), []


def same_place(table: Metadata) -> None:
    """A few bytes that would make up a tensor of any size."""
    first, *others = (entry for index, entry in table.storage_data.items() if index.fqn == QUERY)
    for other in others:
        for name in ("relative_path", "offset", "length"):
            object.__setattr__(other, name, getattr(first, name))


def overlapping(table: Metadata) -> None:
    """The second piece begins in the middle of the first."""
    chunk, offsets = query(table).chunks[1], torch.Size((0, 8))
    table.storage_data[MetadataIndex(QUERY, offsets)] = table.storage_data.pop(MetadataIndex(QUERY, chunk.offsets))
    chunk.offsets = offsets


DAMAGE = {
    "a piece is missing": (lambda t: query(t).chunks.pop(), "do not make up the whole|too small"),
    "a piece is there twice": (lambda t: query(t).chunks.append(query(t).chunks[0]), "are the same bytes of"),
    "two pieces overlap": (overlapping, "hold the same of its numbers"),
    "a piece is elsewhere": (lambda t: place(t, "relative_path", "other.distcp"), "is missing: fetch all files"),
    "a piece is outside the folder": (lambda t: place(t, "relative_path", "../../etc/passwd"), "is missing: fetch all files"),
    "a piece is beyond its file": (lambda t: place(t, "offset", 2**40), "is missing: fetch all files"),
    "a piece is no file": (lambda t: place(t, "offset", 1), "not a whole torch file|are the same bytes of"),
    "a piece is compressed": (lambda t: place(t, "transform_descriptors", ["zstd"]), "stored compressed"),
    "a piece leaves the tensor": (lambda t: sized(t, 32, 31), "not inside of it"),
    "a large tensor": (lambda t: sized(t, 2**20, 2**20), "disagree|too small"),
    "a huge tensor": (lambda t: sized(t, 2**30, 2**30), "has a shape that no memory holds"),
    "a huge tensor of no numbers": (lambda t: sized_norm(t, 0, 2**40, 2**40), "has a shape that no memory holds"),
    "a tensor with too many axes": (lambda t: sized_norm(t, *[0] * 70), "no whole numbers"),
    "another type": (lambda t: setattr(query(t).properties, "dtype", torch.float32), "another type or shape|too small"),
    "a piece claims more bytes than its file has": (lambda t: place(t, "length", 2**44), "is missing: fetch all files"),
    "all pieces are one place": (same_place, "are the same bytes of"),
    "no places": (lambda t: setattr(t, "storage_data", None), "no table of a distributed checkpoint"),
}


def place(table: Metadata, name: str, value: object) -> None:
    object.__setattr__(table.storage_data[MetadataIndex(QUERY, torch.Size((8, 16)))], name, value)


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_refused(tmp_path, kind):
    changed, sentence = DAMAGE[kind]
    in_pieces(tmp_path, PLAIN, {QUERY: blocks(32, 32)}, changed)
    assert_refused(tmp_path, sentence)


class Call:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('RAN').touch()",)


@pytest.mark.parametrize("content", [pickle.dumps(Call()), pickle.dumps({"a": Call()}), b"", b"\x80\x04.", pickle.dumps([1])])
def test_a_table_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    in_pieces(tmp_path, PLAIN, {})
    write(tmp_path, {".metadata": content})
    assert_refused(tmp_path, r"\.metadata is no table")
    assert not (tmp_path / "RAN").exists()


def test_a_part_alone_is_no_source(tmp_path):
    in_pieces(tmp_path, PLAIN, {})
    assert_refused(tmp_path / "__0_0.distcp", "name the folder")


@pytest.mark.parametrize("field", ["fqn", "offset"])
def test_a_table_that_takes_for_ever_to_hash_is_refused(tmp_path, field):
    """Pairs of pairs: a hundred of them are hashed 2^100 times."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    pairs = b")" + b"q\x01h\x01\x86" * 100
    fields = text("fqn") + (text("a") + text("offset") if field == "offset" else b"") + pairs
    index = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81}(" + fields + b"ub"
    place = b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n)\x81}b"
    tables = text("state_dict_metadata") + b"}" + text("storage_data") + b"}" + index + place + b"s"
    in_pieces(tmp_path, PLAIN, {})
    metadata = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}(" + tables + b"ub."
    write(tmp_path, {".metadata": metadata})
    assert_refused(tmp_path, r"\.metadata is no table")
