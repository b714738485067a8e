"""The manifest and its lock."""

import json
import re
import resource
import shlex
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from headgram.cli import app
from headgram.errors import HeadgramError
from headgram.study.lock import Lock, changes, lock_path, missing_rows, read_lock, write_lock
from headgram.study.manifest import Labels, read_manifest
from headgram.study.options import Config
from headgram.study.plan import left_out, make_plan
from headgram.study.resolve import resolve, resolve_all
from tiny import llama_tensors, write_bert, write_llama, write_manifest

SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "llama")
    write_bert(tmp_path / "bert")
    return write_manifest(tmp_path / "models.tsv", {"one": "llama", "two": "bert"})


def test_a_locked_model_holds_all_that_the_plan_needs(manifest):
    entry = resolve(read_manifest(manifest).rows[0])
    (stack,) = entry.stacks
    assert (entry.format, entry.architecture, entry.commit) == ("safetensors", "llama", None)
    assert (stack.layers, stack.heads, stack.kv_heads, stack.circuits["qk"].rank, stack.hidden) == ((0, 1, 2, 3), 4, 2, 8, 32)
    assert len(set(stack.circuits["qk"].digests)) == 4
    assert (list(stack.circuits), list(stack.missing)) == (["qk"], ["ov"])
    assert "o_proj" in stack.missing["ov"]
    assert [file.name for file in entry.files] == ["model.safetensors", "config.json"]


def test_locking_is_incremental_and_survives_a_round_trip(manifest):
    rows = read_manifest(manifest).rows
    path = lock_path(manifest)
    models, problems = resolve_all(rows[:1])
    assert problems == []
    write_lock(path, models)
    assert [row.name for row in missing_rows(rows, read_lock(path))] == ["two"]
    write_lock(path, resolve_all(rows[1:])[0])
    assert list(read_lock(path).models) == ["one", "two"]
    assert read_lock(path).models["one"] == models["one"]
    before = path.read_bytes()
    write_lock(path, {})
    assert path.read_bytes() == before


def test_a_changed_row_is_missing(manifest):
    write_lock(lock_path(manifest), resolve_all(read_manifest(manifest).rows)[0])
    write_manifest(manifest, {"one": "bert", "two": "bert"})
    assert [row.name for row in missing_rows(read_manifest(manifest).rows, read_lock(lock_path(manifest)))] == ["one"]


def test_the_fingerprint_is_the_content_not_the_place(manifest, tmp_path):
    (row, _) = read_manifest(manifest).rows
    before = resolve(row)
    assert changes("one", before) == []
    (tmp_path / "llama").rename(tmp_path / "moved")
    assert changes("one", before) == []  # gone: said by the job that needs it
    write_manifest(manifest, {"one": "moved"})
    assert resolve(read_manifest(manifest).rows[0]).fingerprint == before.fingerprint
    write_llama(tmp_path / "llama", seed=1)
    (sentence,) = changes("one", before)
    assert "changed since it was locked" in sentence
    assert "headgram lock --upgrade one" in sentence
    (sentence,) = changes("one", before, manifest)
    command = shlex.split(re.search(r"run `headgram (.*?)`", sentence)[1])
    done = CliRunner().invoke(app, command)  # the hint, followed
    assert done.exit_code == 0, done.output
    assert changes("one", read_lock(lock_path(manifest)).models["one"]) == []
    write_manifest(manifest, {"one": "llama"})
    assert resolve(read_manifest(manifest).rows[0]).fingerprint != before.fingerprint


def test_a_changed_byte_of_a_large_file_is_found_by_extraction(tmp_path, monkeypatch):
    """A sample of the file may miss a byte, the digest of a layer does not."""
    from headgram.results.record import Provenance, Recipe
    from headgram.stages.extract import extract

    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "m", layers=2, heads=8, kv_heads=8, rank=32, hidden=256)
    row = read_manifest(write_manifest(tmp_path / "models.tsv", {"m": "m"})).rows[0]
    entry = resolve(row)
    path = tmp_path / "m" / "model.safetensors"
    data = path.read_bytes()
    query = llama_tensors(2, 8, 8, 32, 256, seed=0)["model.layers.1.self_attn.q_proj.weight"].numpy().tobytes()
    start = data.index(query)
    next(i for i in range(start, start + len(query)) if flip(data, i, path) and not changes("m", entry))
    source = {"source": "m", "revision": None, "overrides": {}}
    provenance = Provenance(Recipe("extract", "{}", entry.fingerprint, "c"), "m", "self", "qk")
    stack = entry.stacks[0]
    with pytest.raises(HeadgramError, match=r"model m, stack self: layer 1 changed since it was locked"):
        extract(tmp_path / "out.pt", source, stack.layers, stack.circuits["qk"].digests, "stored", provenance)
    assert not (tmp_path / "out.pt").exists()


def flip(data, position, path):
    """Write the file with one bit changed."""
    changed = bytearray(data)
    changed[position] ^= 1
    path.write_bytes(changed)
    return True


@pytest.mark.parametrize("text", ["{", "[]", '{"models": {"a": {}}}', '{"models": {}, "more": 1}'])
def test_a_damaged_lock_is_refused(manifest, text):
    lock_path(manifest).write_text(text)
    with pytest.raises(HeadgramError, match="cannot be read"):
        read_lock(lock_path(manifest))


def test_a_lock_of_another_version_is_refused(manifest):
    lock_path(manifest).write_text(json.dumps(Lock(schema_version=1).model_dump()))
    with pytest.raises(HeadgramError, match="version 1, but this headgram writes version 2"):
        read_lock(lock_path(manifest))


def test_a_lock_that_pins_nothing_around_heads_goes_on_working(manifest):
    """As headgram wrote them before; the run says what to do, and that helps."""
    rows, path = read_manifest(manifest).rows, lock_path(manifest)
    new = resolve_all(rows)[0]
    content = Lock(models=new).model_dump(mode="json")
    for model in content["models"].values():
        for stack in model["stacks"]:
            del stack["around"]
    path.write_text(json.dumps(content))
    old = read_lock(path).models
    assert missing_rows(rows, read_lock(path)) == []
    assert all(changes(name, entry) == [] for name, entry in old.items())
    before, after = (make_plan(entries, Config(), SCRIPTS) for entries in (old, new))
    sentences = left_out(before)
    for name in ("one", "two"):
        (sentence,) = [each for each in sentences if each.startswith(f"{name}: its lock does not pin")]
        assert f"`headgram lock --upgrade {name}` pins them" in sentence
    measured = {record: key for record, key in before.records().items() if record.startswith("models/")}
    assert measured
    assert measured.items() <= after.records().items()  # what was measured stands
    for name in ("one", "two"):
        done = CliRunner().invoke(app, ["lock", "--manifest", str(manifest), "--upgrade", name])
        assert done.exit_code == 0, done.output
    assert read_lock(path).models == new
    assert not [each for each in left_out(after) if "does not pin" in each]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_a_manifest_in_another_encoding(tmp_path, encoding):
    (tmp_path / "m.tsv").write_bytes("name\tsource\na\tmodèle\n".encode(encoding))
    with pytest.raises(HeadgramError, match="not text in UTF-8: save it in that encoding"):
        read_manifest(tmp_path / "m.tsv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name\tsource\t" + "\t".join(f"l{i}" for i in range(2_000_000)), "has more than 1,000 columns, which no real one has"),
        ("name\tsource\n" + "a\n" * 8_000_000, "has more than 1,000,000 lines, which no real one has"),
        ("\n" * 32_000_000, "is empty"),
    ],
    ids=["columns", "lines", "blank lines"],
)
def test_a_manifest_of_millions_takes_no_time_and_little_memory(tmp_path, text, words):
    (tmp_path / "m.tsv").write_text(text)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(HeadgramError, match=words):
        read_manifest(tmp_path / "m.tsv")
    assert time.process_time() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("name\tsource\n", "lists no model"),
        ("name,source\na,b\n", "lacks the column 'name'"),
        ("name\tsource\trevison\na\tb\tc\n", "the column 'revison', which is nearly 'revision'"),
        ("name\tsource\tSteps\na\tb\tc\n", "the column 'Steps', which is nearly 'step'"),
        ("name\tsource\tits colour\na\tb\tc\n", "the column 'its colour', which is no label's name"),
        ("name\tname\tsource\na\ta\tb\n", "repeats the column 'name'"),
        ("name\tsource\t\t\na\tb\t\t\n", "repeats the column ''"),
    ],
)
def test_a_table_that_is_no_manifest(tmp_path, text, words):
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(HeadgramError, match=words):
        read_manifest(tmp_path / "m.tsv")
    with pytest.raises(HeadgramError, match="There is no manifest"):
        read_manifest(tmp_path / "none.tsv")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("../x\ts", "the name"),
        (".hidden\ts", "the name"),
        ("a/b\ts", "the name"),
        ("a b\ts", "the name"),
        ("\ts", "the name"),
        ("1.5\ts", "the name"),
        ("nan\ts", "the name"),
        ("2024-01-01\ts", "the name"),
        ("0x1F\ts", "the name"),
        ("a" * 101 + "\ts", "the name"),
        ("a.\ts", "on some systems"),
        ("con\ts", "on some systems"),
        ("NUL.v1\ts", "on some systems"),
        ("a\t", "source is missing"),
        ("a\ts\t\textra", "4 cells"),
    ],
)
def test_bad_rows(tmp_path, row, words):
    (tmp_path / "m.tsv").write_text(f"name\tsource\trevision\n{row}\n")
    with pytest.raises(HeadgramError, match=words):
        read_manifest(tmp_path / "m.tsv").check()


def test_good_rows_with_overrides(tmp_path):
    (tmp_path / "m.tsv").write_text("source\tname\theads\tmodel_type\n# a comment\n/x y/z\t1b-base\t4\tllama\n\n s \tb\t\t\n")
    first, second = read_manifest(tmp_path / "m.tsv").rows
    assert (first.name, first.source, first.overrides) == ("1b-base", "/x y/z", {"heads": 4, "model_type": "llama"})
    assert (second.source, second.revision, second.overrides) == ("s", None, {})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("b\ts\tpythia\tlate", r"line 3 \(b\): the step is 'late', not a number"),
        ("b\ts\tpythia\tnan", "the step is 'nan', not a number"),
        ("b\ts\tpythia\t1_0", "the step is '1_0', not a number"),
        ("b\ts\t\tinf", "the step is 'inf', not a number"),
        ("b\ts\tpythia\t", "the lineage 'pythia' needs a step, a number: of a base 0"),
        ("b\ts\tpythia\t1e3", "the step 1e3 of the lineage 'pythia' is taken by line 2"),
    ],
)
def test_bad_steps(tmp_path, row, words):
    (tmp_path / "m.tsv").write_text(f"name\tsource\tlineage\tstep\na\ts\tpythia\t1000\n{row}\n")
    manifest = read_manifest(tmp_path / "m.tsv")
    with pytest.raises(HeadgramError, match=words):
        manifest.check()
    assert [row.name for row in manifest.rows] == ["a"]


def test_further_columns_are_labels(tmp_path):
    (tmp_path / "m.tsv").write_text(
        "name\tsource\tstep\tlineage\tdata\tdeduped\na\ts\t1.5\tpythia\tpile\t\nb\ts\t1.5\tother\t\t\nc\ts\n"
    )
    labels = [row.labels for row in read_manifest(tmp_path / "m.tsv").rows]
    assert labels == [Labels("pythia", 1.5, {"data": "pile"}), Labels("other", 1.5), Labels()]


def test_layers_of_several_precisions_keep_them(tmp_path):
    from headgram.checkpoints.known import open_checkpoint
    from headgram.stages.extract import read_layers

    tensors = llama_tensors(3, 4, 2, 8, 32, seed=0)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].half()
    tensors["model.layers.2.self_attn.q_proj.weight"] *= 1e6
    checkpoint = open_checkpoint(write_llama(tmp_path / "m", layers=3, tensors=tensors))
    factors = read_layers(checkpoint, "self", (0, 1, 2), ("query", "key"), "stored")
    for layer in range(3):
        q, k = checkpoint.qk("self", layer)
        assert torch.equal(factors["query"][layer], q.float())
        assert torch.equal(factors["key"][layer], k)
