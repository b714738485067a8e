"""Files and links in a results folder that no run wrote are named, and stay."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from forged_results import DERIVE, MERGE, seal_again, sentences
from locked import locked_llama

from headgram.atlas.reader import open_atlas
from headgram.atlas.repair import repair
from headgram.atlas.verify import verify
from headgram.errors import HeadgramError
from headgram.results.asked import ask_for, asked_for
from headgram.results.claims import Writing, claim, settle
from headgram.results.paths import Results
from headgram.results.record import Provenance
from headgram.run.startup import asked_by_study
from headgram.study.lock import lock_path, write_lock


def asked(results: Path) -> dict[str, str]:
    """The keys of what `made` made, as a run asks for them."""
    ask_for(results, {"provenance/m.json": MERGE.key, "provenance/derived/m.json": DERIVE.key})
    return asked_for(results) or {}


@pytest.mark.parametrize("text", ["notes", "[]", "{}", '{"files": {"../heads.parquet": 3}}', "[" * 10**5])
@pytest.mark.parametrize("place", ["provenance/mine.json", "report/data/mine.json", "models/m/a/mine.json", "atlas/notes.txt"])
def test_a_file_that_no_run_wrote_is_called_that_and_stays(results, whole, place, text):
    path, keys = results / place, asked(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (found,) = [finding for finding in verify(results)[1] if path.name in finding.sentence]
    assert "belongs to no finished artifact" in found.sentence
    assert f"move it out of {results / place.split('/')[0]}" in found.sentence
    assert found in repair(results, [found], keys)
    assert path.read_text() == text
    path.rename(results / path.name)  # what the sentence says
    assert [sentence.replace(str(results), "") for sentence in sentences(results)] == whole


def test_what_a_run_wrote_and_nobody_asks_for_is_removed_by_a_repair(results, whole):
    path, keys = results / "provenance" / "old.json", asked(results)
    claim(results, [Writing(path, [path])])
    path.write_text("{")
    (found,) = [finding for finding in verify(results)[1] if path.name in finding.sentence]
    assert repair(results, [found], keys) == []
    assert [sentence.replace(str(results), "") for sentence in sentences(results)] == whole


def test_a_record_that_nobody_asks_for_has_no_file_removed_of_which_it_tells_nothing_true(results):
    """Whatever it names: what lies there is another's."""
    notes, keys = results / "atlas" / "notes.txt", asked(results)
    notes.write_text("mine")
    forged = results / "provenance" / "forged.json"
    seal_again(forged, [notes, Path(Results(str(results)).table("heads", "m"))], Provenance(MERGE, "m", None))
    notes.write_text("more")
    found = [finding for finding in verify(results)[1] if "notes.txt" in finding.sentence]
    repair(results, found, keys)
    assert notes.read_text() == "more"


PLACES = [
    "atlas", "atlas/heads", "atlas/heads/model=m", "atlas/heads/model=m/heads.parquet", "atlas/new",
    "provenance", "provenance/m.json", "provenance/new.json", "models", "report", "report/data",
]  # fmt: skip


def deep(path: Path) -> None:
    """Folders in one another, so many that no path leads to the last."""
    with contextlib.chdir(path.parent):
        for _ in range(1500):
            os.mkdir(path.name)  # noqa: PTH102
            os.chdir(path.name)


ODDITIES: dict[str, Callable[[Path], None]] = {
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to what no file system holds": lambda path: path.symlink_to("x" * 300),
    "a link to nothing": lambda path: path.symlink_to("/nowhere"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link upwards": lambda path: path.symlink_to(".."),
    "a pipe": os.mkfifo,
    "deep folders": deep,
}


@pytest.mark.parametrize("kind", ODDITIES)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_lies_in_a_results_folder_it_is_named_and_nothing_ends_early(results, place, kind):
    path = results / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    (results / "seed").mkdir()
    (results / "seed" / "mine").touch()
    ODDITIES[kind](path)
    found = verify(results)[1]
    said = " ".join(finding.sentence for finding in found)
    assert "seed/mine belongs to no finished artifact" in said
    assert place in said or kind == "deep folders"
    repair(results, found, {})
    with contextlib.suppress(HeadgramError):
        claim(results, [Writing(results / "provenance" / "m.json", [results / name for name in PLACES if "." in name])])
    settle(results)
    with contextlib.suppress(HeadgramError):
        open_atlas(results).table("heads")
    assert (results / "seed" / "mine").exists()
    if kind == "deep folders":
        subprocess.run(["rm", "-r", str(path)], check=True)  # which pytest could not


def test_a_results_folder_that_is_a_link_to_itself_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").symlink_to("results")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "models.tsv").write_text("name\tsource\nm\tmodels/m\n")
    write_lock(lock_path(tmp_path / "config" / "models.tsv"), {"m": locked_llama()})
    asked_by_study(Path("results"))
    with pytest.raises(HeadgramError, match="holds no artifact to verify"):
        verify(Path("results"))


def test_folders_without_end_are_walked_through_and_what_lies_beyond_a_path_is_passed_over(results, whole, monkeypatch):
    """Folders in folders, deeper than Python recurses and than a path may be long."""
    for level in range(3000):
        if level == 0:
            monkeypatch.chdir(results / "atlas")
        Path("a").mkdir()
        os.chdir("a")
        if level in (10, 1500):
            Path("notes.txt").touch()
    monkeypatch.chdir(results.parent)
    try:
        found = [sentence.replace(str(results), "") for sentence in sentences(results)]
        assert sum("notes.txt belongs to no finished artifact" in sentence for sentence in found) == 2
        assert [sentence for sentence in found if "notes.txt" not in sentence] == whole
    finally:
        subprocess.run(["rm", "-r", results], check=True)  # which pytest could not
