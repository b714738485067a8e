"""Manifests, configurations and results made to harm: nothing in them runs, leads out or fills the machine."""

import json
import os
import pickle
import time
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headgram.atlas.verify import verify
from headgram.errors import HeadgramError
from headgram.results.factors import FactorFiles
from headgram.results.files import remove_temporaries, write_text
from headgram.results.record import (
    Provenance,
    Recipe,
    _sealed_text,
    check,
    is_fresh,
    record_of,
    seal,
)
from headgram.results.tables import read_table
from headgram.study.manifest import read_manifest
from headgram.study.options import load_config, read_options

IDENTITY = Recipe("extract", "{}", "fingerprint", "code")


class Bomb:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


# ---- manifests


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/b", "..", ".hidden", "-rf", "a b", "a;x", "$(x)", "`x`", "{model}", "model=x", "a\0b", "é", "x" * 101],
)
def test_names_that_lead_out_or_mean_something_elsewhere_are_refused(tmp_path, name):
    (tmp_path / "models.tsv").write_text(f"name\tsource\n{name}\tsomewhere\n")
    with pytest.raises(HeadgramError, match="line 2"):
        read_manifest(tmp_path / "models.tsv").check()


@given(st.text(min_size=1))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_manifest_or_refused(tmp_path, text):
    (tmp_path / "models.tsv").write_text(f"name\tsource\trevision\n{text}\n", encoding="utf-8", errors="replace")
    try:
        manifest = read_manifest(tmp_path / "models.tsv")
        manifest.check()
    except HeadgramError:
        return
    results = tmp_path / "results"
    for row in manifest.rows:
        assert (results / row.name).resolve().parent == results.resolve()


# ---- configurations


@pytest.mark.parametrize(
    "text",
    [
        "manifest: !!python/object/apply:os.system ['touch executed']",
        "!!python/object/new:os.system ['touch executed']",
        "manifest: !!python/name:os.system",
        "- a list",
        "just text",
        "a: b: c",
        "{",
        "\0",
        "? [a]\n: b",
        "[" * 10_000,
    ],
)
def test_a_configuration_is_plain_yaml_or_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    with pytest.raises(HeadgramError, match=r"config\.yaml") as caught:
        read_options(Path("config.yaml"), {})
    assert len(str(caught.value)) < 500
    assert not Path("executed").exists()


def test_templates_in_a_configuration_are_text(tmp_path, monkeypatch):
    """Snakemake's own reader would evaluate them."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("__use_yte__: true\n?__import__('os').system('touch executed'):\n  device: cpu\n")
    with pytest.raises(HeadgramError, match="unknown key '__use_yte__'"):
        load_config(read_options(Path("config.yaml"), {}))
    assert not Path("executed").exists()


@pytest.mark.parametrize("key", ["memory_budget", "manifest", "eigen", "unknown", "device"])
def test_a_configuration_that_unfolds_without_end(tmp_path, key):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (tmp_path / "config.yaml").write_text("\n".join(lines) + f"\n{key}: *a29\n")
    start = time.monotonic()
    with pytest.raises(HeadgramError, match=key) as caught:
        load_config(read_options(tmp_path / "config.yaml", {}))
    assert time.monotonic() - start < 10
    assert len(str(caught.value)) < 10_000


def test_given_options_overrule_those_of_the_file_key_by_key(tmp_path):
    (tmp_path / "config.yaml").write_text("eigen:\n  topk: 3\n  tolerance: 1.0e-5\ndevice: cpu\n")
    assert read_options(tmp_path / "config.yaml", {"eigen": {"topk": 5}}) == {
        "eigen": {"topk": 5, "tolerance": 1e-5},
        "device": "cpu",
    }
    assert read_options(tmp_path / "none.yaml", {"device": "cuda"}) == {"device": "cuda"}


# ---- artifacts: whoever makes them knows how to seal a record


def forged(path: Path, content: bytes, **changes: object) -> Path:
    """A sealed record of `content` at `path`, changed and sealed again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    record = record_of(path)
    seal(record, Provenance(IDENTITY, "m", "self", "qk"), [path])
    resealed = json.loads(record.read_text()) | changes
    del resealed["record"]
    record.write_text(_sealed_text(resealed))
    return record


def test_pickles_in_results_run_nothing(tmp_path):
    path = tmp_path / "layers-000-001.pt"
    bomb = Bomb(tmp_path / "executed")
    torch.save({"layers": [0], "query": bomb, "key": bomb}, path)
    for content in (path.read_bytes(), pickle.dumps(bomb)):
        forged(path, content)
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            FactorFiles([path], IDENTITY.key, "qk")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "pipe", "folder"])
def test_a_file_that_never_ends_is_not_read(tmp_path, target):
    record = forged(tmp_path / "layers-000-001.pt", b"content")
    (tmp_path / "layers-000-001.pt").unlink()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "layers-000-001.pt").symlink_to(target)
    with pytest.raises(HeadgramError, match="its size differs"):
        check(record, IDENTITY.key)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {"a.pt": 3}},
        {"files": {"a.pt": {"bytes": "1", "blake2b": ""}}},
        {"files": {"a.pt": {"bytes": 1}}},
        {"files": {"/etc/passwd": {"bytes": 1, "blake2b": ""}}},
        {"files": {"a\0.pt": {"bytes": 1, "blake2b": ""}}},
        {"key": ["x"]},
        {"model": None},
        {"config": "{}"},
        {"upstream": [1]},
        {"schema": 2},
    ],
)
def test_records_that_are_none(tmp_path, changes):
    record = forged(tmp_path / "layers-000-001.pt", b"content", **changes)
    assert not is_fresh(record, IDENTITY.key)
    with pytest.raises(HeadgramError, match="run again"):
        check(record, IDENTITY.key)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"record": ' + "{" * 10**5, "\ud800"])
def test_json_that_is_no_record(tmp_path, text):
    record = tmp_path / "a.json"
    record.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    assert not is_fresh(record, "key")


def test_a_record_tells_nothing_of_files_elsewhere(tmp_path):
    """What it names outside is compared by checksum, and never opened as data, written or removed."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    record = forged(tmp_path / "results" / "provenance" / "m.pt", b"x", files={"../../secret": {"bytes": 6, "blake2b": "0" * 32}})
    problems = [finding.sentence for finding in verify(tmp_path / "results")[1]]
    assert any("its checksum differs" in problem for problem in problems)
    assert not any("secret" in problem.replace(str(secret), "") for problem in problems)
    with pytest.raises(HeadgramError):
        check(record, IDENTITY.key)
    assert secret.read_text() == "secret"


def test_a_table_of_a_few_bytes_that_unfolds_to_billions_of_values(tmp_path):
    path = tmp_path / "table.parquet"
    zeros = pa.table({"x": pa.array(np.zeros(2**24, dtype=np.int8))})
    with pq.ParquetWriter(path, zeros.schema, compression="zstd") as writer:
        for _ in range(5):
            writer.write_table(zeros, row_group_size=2**24)
    assert path.stat().st_size < 2**20
    with pytest.raises(HeadgramError, match="claims 83886080 values"):
        read_table(path)


# ---- links


def test_links_in_results_are_replaced_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("data", ".a.pt.1.tmp"):
        (outside / name).write_text("kept")
    results = tmp_path / "results"
    results.mkdir()
    (results / "table.json").symlink_to(outside / "data")
    (results / ".lock").symlink_to(outside / "data")
    (results / "models").symlink_to(outside)
    write_text(results / "table.json", "new")
    remove_temporaries([results / "table.json"])
    with pytest.raises(OSError, match=r"symbolic|links"):
        filelock.FileLock(results / ".lock", timeout=0).acquire()
    assert not (results / "table.json").is_symlink()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"data": "kept", ".a.pt.1.tmp": "kept"}
