"""Files are written whole or not at all, and checked when they are read."""

import errno
import io
import json
import platform
from dataclasses import replace
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest
import torch

from headgram.errors import HeadgramError
from headgram.results.files import remove_temporaries, write_text, written_whole
from headgram.results.record import (
    Provenance,
    Recipe,
    canonical,
    check,
    digest,
    is_fresh,
    read_record,
    record_of,
    seal,
)
from headgram.results.tables import PAIRS, at_place, read_parts, read_table, write_table

IDENTITY = Recipe("eigen", '{"eigen":{"topk":8}}', "fingerprint", "code", ("upstream",))


def sealed(folder):
    path = folder / "layers-000-001.pt"
    with written_whole(path) as file:
        torch.save({"a": torch.arange(1000)}, file)
    seal(record_of(path), Provenance(IDENTITY, "m", "self"), [path])
    return path


def test_every_part_of_the_recipe_counts():
    keys = {IDENTITY.key}
    for change in (
        {"stage": "gram"},
        {"config": "{}"},
        {"fingerprint": "other"},
        {"code": "other"},
        {"upstream": ("other",)},
        {"upstream": ()},
    ):
        keys.add(replace(IDENTITY, **change).key)
    assert len(keys) == 7
    assert digest("ab", "c") != digest("a", "bc")
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})


def test_a_sealed_artifact_is_fresh_and_passes(tmp_path):
    path = sealed(tmp_path)
    assert is_fresh(record_of(path), IDENTITY.key)
    assert check(record_of(path), IDENTITY.key).model == "m"


def test_only_what_is_read_is_checked(tmp_path):
    """A job on a node has no more of an artifact than the files that it reads."""
    paths = [tmp_path / name for name in ("heads.parquet", "spectra.parquet")]
    for path in paths:
        write_text(path, path.name)
    record = tmp_path / "model.json"
    seal(record, Provenance(IDENTITY, "m", None), paths)
    paths[1].unlink()
    assert check(record, IDENTITY.key, paths[:1]).model == "m"
    with pytest.raises(HeadgramError, match="spectra"):
        check(record, IDENTITY.key, paths)


def test_a_record_says_where_its_job_ran(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    path = record_of(sealed(tmp_path))
    assert read_record(path).key == IDENTITY.key
    record = json.loads(path.read_text())
    assert (record["slurm_job"], record["gpu"], record["host"]) == ("77", "3", platform.node())
    assert datetime.fromisoformat(record["started"]).tzinfo is not None


def test_a_flipped_byte_anywhere_is_found(tmp_path):
    path = sealed(tmp_path)
    data, record = path.read_bytes(), record_of(path).read_bytes()
    for position in range(0, len(data), 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(HeadgramError, match="checksum differs; its record was removed, so that the same command"):
            check(record_of(path), IDENTITY.key)
        assert not is_fresh(record_of(path), IDENTITY.key)
        record_of(path).write_bytes(record)
    path.write_bytes(data)
    assert check(record_of(path), IDENTITY.key)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"key": 1, "files": []}'])
def test_a_damaged_record_is_neither_fresh_nor_read(tmp_path, text):
    path = sealed(tmp_path)
    record_of(path).write_text(text)
    assert not is_fresh(record_of(path), IDENTITY.key)
    with pytest.raises(HeadgramError, match="run again"):
        check(record_of(path), IDENTITY.key)


def test_a_flipped_byte_of_a_record_is_found(tmp_path):
    record = record_of(sealed(tmp_path))
    data = record.read_bytes()
    for position in range(0, len(data), 7):
        record.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert not is_fresh(record, IDENTITY.key)
        with pytest.raises(HeadgramError, match="run again"):
            check(record, IDENTITY.key)


def test_another_key_or_a_lost_file_is_refused(tmp_path):
    path = sealed(tmp_path)
    assert not is_fresh(record_of(path), "another")
    with pytest.raises(HeadgramError, match="another configuration"):
        check(record_of(path), "another")
    path.unlink()
    assert not is_fresh(record_of(path), IDENTITY.key)
    with pytest.raises(HeadgramError, match="cannot be read"):
        check(record_of(path), IDENTITY.key)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, error, words):
    path = tmp_path / "table.json"
    write_text(path, "old")
    with pytest.raises(HeadgramError, match=words):
        write_half(path, error)
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
    assert path.read_text() == "old"


def write_half(path, error):
    with written_whole(path) as file:
        file.write(b"half")
        raise error


class FullDisk(io.RawIOBase):
    """A file on a disk that has room for 1 KiB more."""

    room = 1024

    def writable(self):
        return True

    def write(self, data):
        self.room -= len(memoryview(data).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


def test_a_full_disk_under_torch_is_said(tmp_path):
    with pytest.raises(RuntimeError):
        torch.save({"a": torch.zeros(10**6)}, FullDisk())  # torch hides the system's error behind one of its own
    with pytest.raises(HeadgramError, match="the disk is full"):
        save_to_a_full_disk(tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def save_to_a_full_disk(path):
    with written_whole(path):
        torch.save({"a": torch.zeros(10**6)}, FullDisk())


def test_what_killed_jobs_left_is_removed_and_nothing_else(tmp_path):
    ours = [".layers-000-001.pt.123.tmp", ".m.pt-self-right.7.tmp", "..row-000.parquet-tile-000-001-000-001.8.tmp"]
    others = ["layers.tmp", ".keep.tmp", "a.pt", ".notes.123.tmp", ".layers-000-001.txt.123.tmp", ".layers-000-001.pt.old.tmp"]
    for name in ours + others:
        (tmp_path / name).touch()
    remove_temporaries(tmp_path / name for name in ("layers-000-001.pt", "a.pt", "m.pt", "row-000.parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_equal_tables_give_equal_bytes(tmp_path):
    table = pa.table({"x": pa.array(range(1000))})
    for name in ("a.parquet", "b.parquet"):
        write_table(tmp_path / name, [table], Provenance(IDENTITY, "m", "self"))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert read_table(tmp_path / "a.parquet").equals(table)


def test_all_pairs_of_5120_heads_take_less_than_150_mb(tmp_path):
    """A 70B model's, whose rows of tiles hold 256 heads with 256; random cosines are what no compression makes smaller."""
    random = np.random.default_rng(0)
    own = {"layer": np.repeat(np.arange(4, dtype=np.int32), 64), "head": np.tile(np.arange(64, dtype=np.int32), 4)}
    first, second = np.indices((256, 256)).reshape(2, -1)
    place = {f"{name}_{side}": values[at] for name, values in own.items() for side, at in (("a", first), ("b", second))}
    rows = pa.table(
        {
            **place,
            "shared": place["head_a"] // 8 == place["head_b"] // 8,
            **{name: (random.standard_normal(65536) / 80).astype(np.float32) for name in ("cosine", "transposed")},
        }
    )
    path = tmp_path / "pairs.parquet"
    write_table(path, [at_place(("qk", "self"), rows, PAIRS)] * 8, Provenance(IDENTITY, "m", "self"))
    assert path.stat().st_size / (8 * 65536) * (5120 * 5119 / 2) < 150e6 * 0.7
    assert read_table(path)["cosine"].to_pylist()[:65536] == rows["cosine"].to_pylist()


@pytest.mark.parametrize("labels", [{}, {"stack": "self"}, {"stack": "self", "kind": "q"}, {"stack": "none"}])
def test_parts_of_a_table_are_its_rows_with_the_labels_asked_for(tmp_path, labels):
    """Groups of one label, of several, and of no rows."""
    schema = pa.schema([("stack", pa.string()), ("kind", pa.string()), ("x", pa.int64())])
    q, k, cross = (
        {"stack": stack, "kind": kind, "x": i} for i, (stack, kind) in enumerate([("self", "q"), ("self", "k"), ("cross", "q")])
    )
    groups = [[q, q, q], [cross, cross], [q, cross, k], [], [k, q]]
    parts = [pa.Table.from_pylist(group, schema=schema) for group in groups]
    write_table(tmp_path / "t.parquet", parts, Provenance(IDENTITY, "m", "self"))
    found = [row for part in read_parts(tmp_path / "t.parquet", **labels) for row in part.to_pylist()]
    assert found == [row for group in groups for row in group if labels.items() <= row.items()]
