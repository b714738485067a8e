"""What is headgram's below results, and what becomes of everything else."""

import contextlib
import json

import pytest

from headgram.atlas.repair import repair
from headgram.atlas.verify import verify
from headgram.errors import HeadgramError
from headgram.results.claims import NAME, Writing, claim, settle
from headgram.results.files import part_of, write_text
from headgram.results.record import Provenance, Recipe, _sealed_text, seal


def artifact(results, *names, text="ours"):
    """A sealed artifact of some data files, and how a job announces that it will write it."""
    record = results / "provenance" / "m.json"
    for name in names:
        write_text(results / name, text)
    seal(record, Provenance(Recipe("merge", "{}", "f", "c"), "m", None), [results / name for name in names])
    return Writing(record, [record, *(results / name for name in names)])


def files_of(results):
    return {
        str(path.relative_to(results)): path.read_bytes() for path in results.rglob("*") if path.is_file() and path.name != NAME
    }


def test_what_is_not_there_yet_is_claimed_and_may_then_lie_there_without_a_record(tmp_path):
    writing = Writing(tmp_path / "a.json", [tmp_path / "a.json", tmp_path / "a.pt"])
    claim(tmp_path, [writing])
    write_text(tmp_path / "a.pt", "left by a killed job")
    claim(tmp_path, [writing])


@pytest.mark.parametrize("kind", ["file", "empty", "link", "dangling link", "folder"])
def test_what_no_record_names_is_in_the_way_and_stays(tmp_path, kind):
    writing = Writing(tmp_path / "a.json", [tmp_path / "a.json", tmp_path / "a.pt"])
    path = tmp_path / "a.pt"
    if kind == "folder":
        path.mkdir()
    elif "link" in kind:
        path.symlink_to("/nowhere" if "dangling" in kind else "/etc/hostname")
    else:
        path.write_text("" if kind == "empty" else "mine")
    for _ in range(2):
        with pytest.raises(HeadgramError, match="a.pt is in the way: .* move it elsewhere, or delete it, and run again"):
            claim(tmp_path, [writing])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_a_folder_in_the_place_of_a_claimed_file_is_in_the_way(tmp_path):
    writing = Writing(tmp_path / "a.json", [tmp_path / "a.json", tmp_path / "a.pt"])
    claim(tmp_path, [writing])
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(HeadgramError, match="a.pt is in the way"):
        claim(tmp_path, [writing])


@pytest.mark.parametrize("lost", ["[]", "{", '{"../a": null, "/b": null, "c": 3, "d": [1, 2, 3]}', "[" * 10**5, None])
def test_where_claims_are_lost_records_say_what_is_ours(tmp_path, lost):
    writing = artifact(tmp_path, "a.pt", "b.pt")
    if lost is not None:
        (tmp_path / NAME).write_text(lost)
    claim(tmp_path, [writing])
    assert set(json.loads((tmp_path / NAME).read_text())) == {"a.pt", "b.pt", "provenance/m.json"}


def test_what_an_artifact_no_longer_holds_is_removed_when_the_run_ends(tmp_path):
    """Though Snakemake removed the old record, and a run was killed in between; nothing else goes."""
    old = artifact(tmp_path, "seed/m.json", "seed/changed.json", "a.pt")
    others = {"seed/mine.json": b"mine", "notes.txt": b"mine"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    writing = Writing(old.record, [old.record, tmp_path / "a.pt"])
    claim(tmp_path, [writing])
    old.record.unlink()
    (tmp_path / "seed" / "changed.json").write_text("edited")
    settle(tmp_path)
    assert (tmp_path / "seed" / "m.json").exists()  # while no record says otherwise
    claim(tmp_path, [writing])
    artifact(tmp_path, "a.pt", text="new")
    settle(tmp_path)
    assert set(files_of(tmp_path)) == {*others, "seed/changed.json", "a.pt", "provenance/m.json"}
    assert {name: files_of(tmp_path)[name] for name in others} == others
    assert "seed/m.json" not in json.loads((tmp_path / NAME).read_text())
    with pytest.raises(HeadgramError, match="changed.json is in the way"):
        claim(tmp_path, [Writing(old.record, [*old.files])])


def test_what_a_job_of_an_earlier_run_left_half_written_is_removed_when_a_run_ends(tmp_path):
    """It may have outlived its run, and been killed during the next one, which did its work."""
    row = tmp_path / "row-000.parquet"
    writing = Writing(row.with_suffix(".json"), [row, row.with_suffix(".json")])
    claim(tmp_path, [writing])
    part = part_of(row, "000-001-002-003")
    left = [tmp_path / f".{path.name}.123.tmp" for path in (row, part, writing.record)]
    for path in (part, *left):
        path.write_bytes(b"half")
    settle(tmp_path)
    assert part.exists()  # a job goes on from it
    assert not any(path.exists() for path in left)
    row.write_bytes(b"whole")
    writing.record.write_text("{}")
    settle(tmp_path)
    assert set(files_of(tmp_path)) == {row.name, writing.record.name}


def test_nothing_is_removed_beyond_a_link_or_outside(tmp_path):
    """Whatever claims and records say."""
    results, outside = tmp_path / "results", tmp_path / "outside"
    writing = artifact(results, "seed/m.json", "../outside/x.json", "a.pt")
    claim(results, [Writing(writing.record, [writing.record, results / "a.pt"])])
    (results / "seed").rename(outside / "seed")
    (results / "seed").symlink_to(outside / "seed")
    artifact(results, "a.pt")
    settle(results)
    assert (outside / "seed" / "m.json").exists()
    assert (outside / "x.json").exists()


@pytest.mark.parametrize("name", ["", ".", "seed/..", "./.", "a//b", "\ud800", "\udc80/x", "x" * 300, "x/" * 3000 + "x", "a\0b"])
def test_a_claim_or_a_record_that_names_no_file_below_results_is_none(tmp_path, name):
    """Neither stops a run, nor reaches what lies beside the results folder."""
    results, mine = tmp_path / "results", tmp_path / ".results.1.tmp"
    ours = dict.fromkeys(("a.pt", "provenance/m.json"))
    writing = artifact(results, "a.pt")
    mine.touch()
    content = json.loads(writing.record.read_text())
    content["files"][f"../{name}"] = content["files"]["../a.pt"]
    del content["record"]
    with contextlib.suppress(UnicodeEncodeError):  # no record of such a name is whole
        writing.record.write_text(_sealed_text(content))
    (results / NAME).write_text(json.dumps({name: None, f"{name}/": ["a.json", 1, "x"], "b.pt": [name, 1, "x"], **ours}))
    claim(results, [writing])
    settle(results)
    repair(results, verify(results)[1], {})
    assert mine.exists()
    assert set(json.loads((results / NAME).read_text())) == set(ours)


def test_links_on_the_way_are_refused_before_anything_is_read_or_removed(tmp_path):
    results, outside = tmp_path / "results", tmp_path / "outside"
    writing = artifact(results, "atlas/a.pt")
    (results / "atlas").rename(outside)
    (results / "atlas").symlink_to(outside)
    (outside / ".a.pt.1.tmp").touch()
    with pytest.raises(HeadgramError, match="atlas is a symbolic link"):
        claim(results, [writing])
    (results / "atlas").unlink()
    claim(results, [writing])
    assert (outside / ".a.pt.1.tmp").exists()
