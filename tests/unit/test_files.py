"""Publishing a file: in which order the system is asked, and that no link is followed."""

import errno
import os
from pathlib import Path

import pytest

from headgram.errors import HeadgramError
from headgram.results import files
from headgram.results.files import RESULTS, open_new, refuse_links, scratch, write_text
from headgram.study.lock import remove_temporaries_of, write_lock


@pytest.fixture
def calls(monkeypatch):
    """What the system is asked to do, in order: flushes by the file's or folder's name, and renames."""
    seen: list[tuple[str, ...]] = []
    fsync, replace = os.fsync, os.replace

    def named_fsync(number):
        seen.append(("flush", str(Path(f"/proc/self/fd/{number}").readlink())))
        fsync(number)

    def named_replace(source, target, **folders):
        seen.append(("rename", str(source), str(target)))
        replace(source, target, **folders)

    monkeypatch.setattr(os, "fsync", named_fsync)
    monkeypatch.setattr(os, "replace", named_replace)
    return seen


def test_a_file_is_flushed_then_named_then_its_folder_is_flushed(tmp_path, calls):
    path = tmp_path / "table.json"
    write_text(path, "text")
    temporary = tmp_path / f".table.json.{os.getpid()}.tmp"
    assert calls == [("flush", str(temporary)), ("rename", str(temporary), str(path)), ("flush", str(tmp_path))]


@pytest.mark.parametrize(("number", "accepted"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch, number, accepted):
    """Some file systems flush no folder; a disk that fails is another matter."""
    fsync = os.fsync

    def fails_for_folders(file):
        if Path(f"/proc/self/fd/{file}").readlink() == tmp_path:
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, "fsync", fails_for_folders)
    if accepted:
        write_text(tmp_path / "table.json", "text")
    else:
        with pytest.raises(HeadgramError, match="Input/output error"):
            write_text(tmp_path / "table.json", "text")


def test_a_new_file_is_never_opened_through_a_link(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    temporary = tmp_path / f".table.json.{os.getpid()}.tmp"
    temporary.symlink_to(outside)
    write_text(tmp_path / "table.json", "new")
    assert (tmp_path / "table.json").read_text() == "new"
    assert not (tmp_path / "table.json").is_symlink()
    with scratch(tmp_path / "m.pt") as reserve:
        (tmp_path / f".m.pt-b.{os.getpid()}.tmp").symlink_to(outside)
        reserve("b", 100)
    # Somebody puts a link there between looking and opening.
    monkeypatch.setattr(files.Path, "unlink", lambda path, missing_ok=False: None)
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(FileExistsError):
        open_new(tmp_path / "link")
    assert outside.read_text() == "kept"


@pytest.mark.parametrize("level", ["atlas", "atlas/heads", "atlas/heads/model=m"])
@pytest.mark.parametrize("target", ["outside", "../nowhere", "results/models"])
def test_a_link_at_any_level_inside_results_is_refused(tmp_path, monkeypatch, level, target):
    """Wherever it leads, back into the results too; the results folder itself may be a link."""
    for folder in ("elsewhere/results/models", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    results = tmp_path / "results"
    results.symlink_to("elsewhere/results")
    monkeypatch.setenv(RESULTS, str(results))
    path = results / "atlas" / "heads" / "model=m" / "heads.parquet"
    write_text(path, "text")
    folder = results / level
    folder.rename(results / "moved")
    folder.symlink_to(tmp_path / target)
    words = (
        f"{folder} is a symbolic link to {tmp_path / target}, and headgram follows none inside the results folder: put a folder"
    )
    for attempt in (lambda: write_text(path, "new"), lambda: refuse_links(path), lambda: scratch(path).__enter__()):
        with pytest.raises(HeadgramError) as caught:
            attempt()
        assert str(caught.value).startswith(words)
    assert list((tmp_path / "outside").iterdir()) == list((results / "models").iterdir()) == []
    write_text(tmp_path / "outside" / "elsewhere.json", "outside of results, links are the user's matter")


def test_temporary_files_beside_the_lock_are_removed(tmp_path):
    """By whoever writes the lock, and by a run that has nothing to write to it."""
    lock = tmp_path / "models.lock.json"
    left, other = tmp_path / ".models.lock.json.123.tmp", tmp_path / ".notes.123.tmp"
    for remove in (lambda: write_lock(lock, {}), lambda: remove_temporaries_of(lock)):
        left.touch()
        other.touch()
        remove()
        assert not left.exists()
        assert other.exists()
