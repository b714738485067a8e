"""Torch's own weight files: only tensors that lie in the archive are weights, whatever else torch would make of the pickle."""

from __future__ import annotations

import collections
import io
import time
import tracemalloc
import zipfile

import pytest
import torch
from checkpoint_files import config_bytes, llama_tensors
from hostile_files import QUERY, archive, assert_refused, pickled, tensor_pickle, write

from headgram.checkpoints.bin_store import BinStore
from headgram.checkpoints.known import open_checkpoint
from headgram.families.layouts import Cut


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def storage(kind: bytes = b"FloatStorage", location: str = "cpu", numel: int = 4) -> bytes:
    return b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text("0") + text(location) + number(numel) + b"tQ"


def call(name: bytes, *arguments: bytes) -> bytes:
    return b"c" + name + b"\n(" + b"".join(arguments) + b"tR"


PAIR = b"(" + number(2) + number(2) + b"t"
STEPS = b"(" + number(2) + number(1) + b"t"
HOOKS = b"ccollections\nOrderedDict\n)R"
PLAIN = call(b"torch._utils\n_rebuild_tensor_v2", storage(), number(0), PAIR, STEPS, b"\x89", HOOKS)


def table(value: bytes, name: str = QUERY) -> bytes:
    return archive(b"\x80\x02}" + text(name) + value + b"s.", {"0": bytes(16)})


#: Its last two axes have 2**60 numbers together, its first has none.
NOTHING = b"(" + number(0) + 2 * number(2**30) + b"t"
NEGATED = b"}" + text("neg") + b"\x88s"
KINDS = {
    "memory that was never written": call(b"torch\nTensor", number(2), number(2)),
    "memory of a type that was never written": call(b"torch\nFloatTensor", number(2), number(2)),
    "gigabytes that were never written": call(b"torch\nTensor", number(2**20), number(2**20)),
    "a new object": b"ctorch\nTensor\n(" + number(18) + number(18) + b"t\x81",
    "a storage of its own": call(b"torch.storage\nUntypedStorage", number(16)),
    "the meta device": call(
        b"torch._utils\n_rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", PAIR, STEPS, b"\x89"
    ),
    "a storage on the meta device": call(
        b"torch._utils\n_rebuild_tensor_v2", storage(location="meta"), number(0), PAIR, STEPS, b"\x89", HOOKS
    ),
    "a negated view": call(
        b"torch._utils\n_rebuild_tensor_v2", storage(), number(0), PAIR, STEPS, b"\x89", HOOKS, NEGATED
    ),
    "a nested tensor": call(b"torch._utils\n_rebuild_nested_tensor", PLAIN, PAIR, STEPS, PAIR),
    "a sparse tensor": call(b"torch._utils\n_rebuild_sparse_tensor", b"N", b"(t"),
    "a subclass": call(b"torch._tensor\n_rebuild_from_type_v2", b"ctorch._utils\n_rebuild_tensor_v2\n", b"N", b"N", b"N"),
    "a tensor that is set to another storage": PLAIN + b"(" + storage() + number(0) + PAIR + STEPS + b"tb",
    "one record under two lengths": PLAIN
    + b"s"
    + text("more")
    + call(b"torch._utils\n_rebuild_tensor_v2", storage(numel=8), number(0), PAIR, STEPS, b"\x89", HOOKS),
    "a record longer than stored": call(
        b"torch._utils\n_rebuild_tensor_v2", storage(numel=6), number(2), PAIR, STEPS, b"\x89", HOOKS
    ),
    "a record under another type": call(
        b"torch._utils\n_rebuild_tensor_v2", storage(b"DoubleStorage"), number(0), PAIR, STEPS, b"\x89", HOOKS
    ),
    "no numbers in a shape that no memory holds": call(
        b"torch._utils\n_rebuild_tensor_v2", storage(), number(0), NOTHING, NOTHING, b"\x89", HOOKS
    ),
    "one name twice": PLAIN + b"s" + text(QUERY) + PLAIN,
    "a key that takes for ever to hash": b")" + b"\x86".join(b"q\x01h\x01" for _ in range(100)) + b"\x86" + PLAIN + b"s",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_only_tensors_that_lie_in_the_archive_are_weights(tmp_path, kind):
    write(tmp_path, {"pytorch_model.bin": table(KINDS[kind]), "config.json": config_bytes(hidden_size=2)})
    assert_refused(tmp_path, r"pytorch_model\.bin")


def test_what_is_refused_above_is_right_but_for_its_kind(tmp_path):
    write(tmp_path, {"m.bin": table(PLAIN)})
    assert torch.equal(BinStore({"m": tmp_path / "m.bin"}).part(QUERY), torch.zeros(2, 2))
    assert_kept(tmp_path, {"a": torch.ones(2).to(torch.float8_e4m3fn), "b": torch.ones(3, dtype=torch.complex64)})


def assert_kept(folder, tensors):
    torch.save(tensors, folder / "kept.bin")
    store = BinStore({"kept": folder / "kept.bin"})
    for name, tensor in tensors.items():
        assert store.shape(name) == tuple(tensor.shape)
        assert torch.equal(store.part(name).view(torch.uint8), tensor.detach().contiguous().view(torch.uint8))


def test_views_parameters_and_shared_storages_are_read_as_torch_reads_them(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    assert_kept(
        tmp_path,
        {
            "whole": base, "transposed": base.T, "rows": base[1:3], "columns": base[:, 1:4], "steps": base[::2, ::3],
            "parameter": torch.nn.Parameter(base + 1), "nothing": torch.zeros(0, 3), "number": torch.tensor([7]),
        },
    )  # fmt: skip


def test_strided_tensors_take_no_more_memory_than_their_numbers(tmp_path):
    """Each of `strided` spreads over all of a storage, of which it is a part or the transpose."""
    wide = torch.zeros(512, 2048)
    strided = {"transposed": torch.zeros(512, 512).T, **{f"columns {i}": wide[:, i::4] for i in range(4)}}
    cut = Cut(0, tuple((row, row + 8) for row in range(0, 512, 16)))
    torch.save(strided, tmp_path / "m.bin")
    store = BinStore({"m": tmp_path / "m.bin"})
    tracemalloc.start()
    store.keep((name, None) for name in strided)
    kept = tracemalloc.get_traced_memory()[0]
    store.keep([])
    tracemalloc.reset_peak()
    store.raw("transposed", cut)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    each = store.nbytes("transposed")
    assert kept < 5.1 * each
    assert peak < 1.6 * each


def test_a_cut_beyond_a_tensor_reads_no_other_memory(tmp_path):
    torch.save({"a": torch.zeros(4, 4)}, tmp_path / "m.bin")
    with pytest.raises(ValueError, match="incompatible"):
        BinStore({"m": tmp_path / "m.bin"}).raw("a", Cut(0, ((2, 2**20),)))


def test_a_training_checkpoints_other_values_say_nothing(tmp_path):
    tensors = llama_tensors()
    more = {"epoch": 3, "rate": 0.1, "sizes": torch.Size([1, 2]), "list": [1, {"a": {2}}], "milestones": collections.Counter([3])}
    model = torch.nn.Linear(2, 2).state_dict()  # an OrderedDict with `_metadata`
    content = pickled({**tensors, **more, "inner": model})
    write(tmp_path, {"pytorch_model.bin": content, "config.json": config_bytes()})
    with open_checkpoint(tmp_path) as checkpoint:
        w_q, _ = checkpoint.qk("self", 1)
        first = checkpoint.digest("self", 1)
    assert torch.equal(w_q.flatten(0, 1), tensors["model.layers.1.self_attn.q_proj.weight"])
    assert open_checkpoint(tmp_path).digest("self", 1) == first


def test_a_large_memo_index_takes_no_memory(tmp_path):
    content = archive(b"\x80\x02}r\xff\xff\xff\xff" + text(QUERY) + PLAIN + b"s.", {"0": bytes(16)})
    (tmp_path / "m.bin").write_bytes(content)
    assert BinStore({"m": tmp_path / "m.bin"}).shape(QUERY) == (2, 2)


def test_two_records_of_one_name_are_refused(tmp_path):
    content = io.BytesIO(archive(tensor_pickle((2, 2), (2, 1)), {"0": bytes(16)}))
    with zipfile.ZipFile(content, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("archive/data/0", bytes(range(16)))
    write(tmp_path, {"pytorch_model.bin": content.getvalue(), "config.json": config_bytes()})
    assert_refused(tmp_path, "two records of one name")


def test_the_format_before_torch_1_6_is_refused_with_a_hint(tmp_path):
    content = pickled(llama_tensors(), _use_new_zipfile_serialization=False)
    write(tmp_path, {"pytorch_model.bin": content, "config.json": config_bytes()})
    assert_refused(tmp_path, r"older than torch 1\.6: .* convert it to safetensors")


def test_tables_that_hold_one_table_many_times_take_no_time(tmp_path):
    entries = b"".join(text(f"{i:05d}") + b"N" for i in range(100_000))
    again = b"".join(text(f"t{i}") + b"h\x00" for i in range(9_000))
    content = b"\x80\x02}(" + text("first") + b"}q\x00(" + entries + b"u" + again + b"u."
    began = time.process_time()
    write(tmp_path, {"pytorch_model.bin": archive(content, {"0": bytes(16)}), "config.json": config_bytes()})
    assert_refused(tmp_path, "more tables and tensors than any checkpoint has")
    assert time.process_time() - began < 20


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_what_git_leaves_in_the_place_of_a_large_file_is_called_by_its_name(tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    write(tmp_path, {name: pointer, "config.json": config_bytes()})
    assert_refused(tmp_path, r"pointer of Git LFS.* `git lfs pull`")
