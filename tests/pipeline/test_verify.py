"""`headgram verify` finds whatever was touched."""

import json
import os
import random
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headgram
from headgram.atlas.verify import verify
from headgram.results.record import _sealed_text
from pipeline.conftest import edit


def test_a_finished_run_is_whole(finished):
    done = finished.headgram("verify")
    assert done.returncode == 0, done.stderr
    assert "all as they were written" in done.stdout


def problems_of(results: Path) -> list[str]:
    """What verify says of a results folder."""
    return [finding.sentence for finding in verify(results)[1]]


def artifacts_of(results: Path) -> list[Path]:
    parts = ("atlas", "models", "seed", "provenance")
    return sorted(path for part in parts for path in (results / part).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def scratch(finished, tmp_path_factory):
    """Finished results that each test leaves as it found them."""
    return finished.copy(tmp_path_factory.mktemp("verify") / "project").folder / "results"


def with_bit_flipped(path: Path, position: int, bit: int) -> list[str]:
    """What verify says of results in which one bit of one file differs."""
    data = path.read_bytes()
    path.write_bytes(data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :])
    try:
        return problems_of(path.parents[[parent.name for parent in path.parents].index("results")])
    finally:
        path.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_found(scratch):
    chance = random.Random(0)
    folders = {path.relative_to(scratch).parts for path in artifacts_of(scratch)}
    assert {parts[0] for parts in folders} == {"atlas", "models", "seed", "provenance"}
    assert {parts[4:5] for parts in folders if parts[0] == "models"} == {(), ("weights",), ("eigen",), ("gram",)}
    for path in artifacts_of(scratch):
        problems = with_bit_flipped(path, chance.randrange(path.stat().st_size), chance.randrange(8))
        assert any(path.name in problem for problem in problems), path
    assert problems_of(scratch) == []


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_is_found(scratch, data):
    path = data.draw(st.sampled_from(artifacts_of(scratch)), label="file")
    position = data.draw(st.integers(0, path.stat().st_size - 1), label="position")
    assert any(path.name in problem for problem in with_bit_flipped(path, position, data.draw(st.integers(0, 7), label="bit")))


def resealed(record: Path, **changes) -> None:
    """A record that was changed by someone who knows how to seal it."""
    content = json.loads(record.read_text()) | changes
    del content["record"]
    record.write_text(_sealed_text(content))


def test_a_record_that_contradicts_itself_is_named(finished, tmp_path):
    results = finished.copy(tmp_path / "project").folder / "results"
    resealed(results / "provenance" / "tiny-bert.json", config={"export": {"compression": "none"}})
    problems = problems_of(results)
    assert any("its key is not that of its stage, configuration" in problem for problem in problems)
    assert any("heads.parquet: its metadata and its record name another config" in problem for problem in problems)


def test_another_checkpoint_than_the_locked_one_is_named(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    edit(project.folder / "config" / "models.lock.json", '"fingerprint": "', '"fingerprint": "0')
    done = project.headgram("verify")
    assert done.returncode == 1
    assert "tiny-bert.json: it was measured from a checkpoint with fingerprint" in done.stderr
    assert "tiny-llama" not in done.stderr


def test_what_a_record_says(finished):
    """Everything that the numbers come from, spelled out."""
    lock = json.loads((finished.folder / "config" / "models.lock.json").read_text())["models"]["tiny-llama"]
    record = json.loads((finished.folder / "results" / "provenance" / "tiny-llama.json").read_text())
    assert record["lock"] == lock
    assert record["headgram"] == headgram.__version__
    assert record["stages"]["eigen"]["qk"]["config"]["eigen"]["topk"] == 8
    assert record["stages"]["extract"]["qk"]["config"] == {"weights": {"dtype": "stored"}}
    assert all(len(record["stages"][stage]["qk"]["code"]) == 32 for stage in ("extract", "eigen", "gram"))
    assert record["upstream"] == [
        *(record["stages"][stage]["qk"]["key"] for stage in ("eigen", "gram")),
        record["stages"]["rotary"][""]["key"],
    ]
    assert record["precision"] == "float64"
    assert record["versions"]["torch"] == version("torch")
    assert 0 < record["residual"] < 1e-12
    assert record["jobs"]["eigen"]["count"] == record["jobs"]["gram"]["count"] == 2
    assert record["jobs"]["eigen"]["devices"] == ["cpu"]
    assert record["jobs"]["eigen"]["seconds"] > 0
    heads = finished.folder / "results" / "atlas" / "heads" / "model=tiny-llama" / "heads.parquet"
    said = json.loads(pq.read_schema(heads).metadata[b"headgram"])
    assert said.items() <= record.items()
    assert {"lock", "stages", "config", "code", "device", "precision", "versions", "headgram"} <= said.keys()


def test_missing_and_foreign_files_are_named(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    results = project.folder / "results"
    (results / "seed" / "tiny-bert.json").unlink()
    (results / "atlas" / "heads" / "model=tiny-bert" / "extra.parquet").write_bytes(b"")
    done = project.headgram("verify", "results")
    assert done.returncode == 1
    assert "tiny-bert.json cannot be read" in done.stderr
    assert "extra.parquet belongs to no finished artifact" in done.stderr
    (results / "provenance" / "mine.json").write_text("[]")
    assert "mine.json belongs to no finished artifact" in project.headgram("verify").stderr
    results.rename(project.folder / "other results")
    said = project.headgram("verify", "other results").stderr
    followed = project.headgram(*shlex.split(re.search(r"`headgram (.*?)`", said)[1]))
    assert "the next run does not mend all of it" in followed.stderr
    left = followed.stderr.splitlines()[-2:]
    for name, line in zip(("extra.parquet", "mine.json"), left, strict=True):
        assert re.search(rf"{name} belongs to no finished artifact, .*: move it out of other results/\w+, or delete it", line)


def test_tables_that_contradict_each_other_are_named(finished, tmp_path):
    from headgram.atlas.verify import _identity_problems

    folder = finished.copy(tmp_path / "project").folder / "results" / "atlas"
    files = {name: folder / name / "model=tiny-llama" / f"{name}.parquet" for name in ("heads", "spectra", "gram", "pairs")}
    assert list(_identity_problems(files)) == []
    whole = files["pairs"].read_bytes()
    table = pq.read_table(files["pairs"].open("rb"))
    for factor, problem in ((1.01, "the cosine of a pair fails"), (np.float32(1e3), "a cosine of a pair lies outside [-1, 1]")):
        scaled = [(table["cosine"].to_numpy() * factor).astype(np.float32)]
        place = table.schema.get_field_index("cosine")
        pq.write_table(table.set_column(place, table.schema.field("cosine"), scaled), files["pairs"])
        assert any(found.startswith(problem) for found in _identity_problems(files))
    files["pairs"].write_bytes(whole)
    table = pq.read_table(files["heads"].open("rb"))
    changed = table.set_column(
        table.schema.get_field_index("fro_sq"), table.schema.field("fro_sq"), [table["fro_sq"].to_numpy() * 1.01]
    )
    pq.write_table(changed, files["heads"])
    assert [problem.split(" fails")[0] for problem in _identity_problems(files)] == [
        "sum(s²) = fro_sq",
        "sum(λ²) = (fro_sq + self_overlap) / 2",
        "gram[a, a] = fro_sq",
    ]


def test_derived_tables_that_contradict_the_merged_ones_are_named(finished, tmp_path):
    from headgram.atlas.verify import _derived_problems

    folder = finished.copy(tmp_path / "project").folder / "results" / "atlas"
    files = {name: folder / name / "model=tiny-llama" / f"{name}.parquet" for name in ("overlap", "layers", "models")}
    assert list(_derived_problems(files)) == []
    for name, column in (("layers", "trace_q25"), ("models", "directionality_median"), ("overlap", "signed")):
        table = pq.read_table(files[name].open("rb"))
        place = table.schema.get_field_index(column)
        pq.write_table(table.set_column(place, table.schema.field(place), [table[column].to_numpy() + 2]), files[name])
    assert [problem.split(" fails")[0] for problem in _derived_problems(files)] == [
        "trace_q25",
        "directionality_median of the model",
        "an overlap of signed directions lies outside [0, 1]",
    ]


def flip(path: Path) -> None:
    """One bit in the middle; the date says nothing of it."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


def hide(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def test_one_repair_and_one_run_make_anew_whatever_was_damaged(finished, tmp_path):
    """Records and data of every stage; what is somebody else's stays."""
    project = finished.copy(tmp_path / "project")
    results, before = project.folder / "results", project.tables()
    damages = {
        "models/tiny-llama/self/qk/weights/*.pt": flip,
        "models/tiny-bert/self/qk/weights/*.json": Path.unlink,
        "models/tiny-llama/self/qk/eigen/layers-000-001.parquet": flip,
        "models/tiny-llama/self/qk/eigen/layers-002-003.json": Path.unlink,
        "models/tiny-bert/self/qk/eigen/layers-000-001.pt": Path.unlink,
        "models/tiny-llama/self/qk/gram/row-000.parquet": cut,
        "models/tiny-bert/self/qk/gram/row-001.json": flip,
        "atlas/heads/model=tiny-bert/heads.parquet": flip,
        "atlas/directions/tiny-llama.pt": hide,
        "provenance/derived/tiny-llama.json": cut,
        "provenance/tiny-llama.json": Path.unlink,
    }
    damaged = [path for pattern in damages for path in results.glob(pattern)]
    assert len(damaged) == len(damages)
    for pattern, damage in damages.items():
        for path in results.glob(pattern):
            damage(path)
    (results / "atlas" / "notes.txt").write_text("mine")
    found = project.headgram("verify")
    assert found.returncode == 1
    assert all(path.name in found.stderr for path in damaged)
    repaired = project.headgram("verify", "--repair")
    assert repaired.returncode == 1
    left = repaired.stderr.partition("does not mend all of it:")[2].split("\n  ")[1:]
    assert ["results/atlas/notes.txt belongs to no finished artifact" in line for line in left] == [True]
    (results / "atlas" / "notes.txt").rename(results / "notes.txt")
    project.run()
    done = project.headgram("verify")
    assert done.returncode == 0, done.stderr
    assert project.tables() == before
    assert all(path.is_file() and not path.is_symlink() for path in damaged)
    assert project.planned() == set()


def test_nothing_to_verify(project):
    done = project.headgram("verify")
    assert done.returncode == 1
    assert "no artifact to verify" in done.stderr


def test_results_that_lead_round_in_a_loop_are_one_sentence(project):
    assert project.headgram("lock").returncode == 0
    (project.folder / "results").symlink_to("results")
    for command in ("verify", "show", "export"):
        done = project.headgram(command)
        assert done.returncode == 1
        assert done.stderr.startswith("headgram: ")
        assert "Traceback" not in done.stderr
