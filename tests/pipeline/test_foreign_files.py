"""Whatever lies in the results folder and is not headgram's, survives every run; no link in it is followed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from headgram.results.files import RESULTS
from pipeline.conftest import edit
from tiny import write_manifest

#: What people keep in results: notes, and names that look like what headgram, Snakemake or an editor might make.
STRANGERS = ("notes.md", ".hidden", ".notes.md.123.tmp", "mine.json", "tile-000-001-000-001.parquet", "empty/kept.txt")


@pytest.fixture(scope="module")
def with_report(finished, tmp_path_factory):
    """The tiny project with its report. Not to be changed: take a copy."""
    project = finished.copy(tmp_path_factory.mktemp("with report") / "project")
    edit(project.folder / "config" / "config.yaml", "report:\n  enabled: false", "report:\n  enabled: true")
    project.run()
    return project


@pytest.fixture
def project(with_report, tmp_path):
    return with_report.copy(tmp_path / "project")


def changed(project):
    """An option that all spectra, and what follows from them, depend on."""
    edit(project.folder / "config" / "config.yaml", "topk: 8", "topk: 4")


def planted(folder):
    """Strangers in every folder, with their content."""
    kept = {}
    for home in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in STRANGERS:
            path = home / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"mine: {path.relative_to(folder)}")
            kept[path] = path.read_text()
    return kept


def surviving(kept):
    return {path: path.read_text() for path in kept if path.exists()}


def error_of(done) -> str:
    assert done.returncode != 0
    said = {line for line in done.stderr.splitlines() if line.startswith("headgram: ")}
    (sentence,) = {line for line in said if " jobs" not in line and "without the circuit ov" not in line}
    assert "Traceback" not in done.stderr
    return sentence


def test_strangers_in_every_folder_survive_every_run(project):
    """Stages made anew, a model and the original script's files taken out, a report that fails, all records lost."""
    results = project.folder / "results"
    kept = planted(results)
    changed(project)
    edit(project.folder / "config" / "config.yaml", "original:\n  enabled: true", "original:\n  enabled: false")
    write_manifest(project.folder / "config" / "models.tsv", {"tiny-llama": "models/llama"})
    project.run()
    assert surviving(kept) == kept
    ours = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file() and path not in kept}
    assert "report/data/tiny-llama.js" in ours
    assert [name for name in ours if "tiny-bert" in name and name.startswith("report/")] == []
    assert {name for name in ours if name.startswith("seed/")} == {"seed/tiny-bert.json", "seed/tiny-bert-eigdirs.pt"}

    heads = results / "atlas" / "heads" / "model=tiny-llama" / "heads.parquet"
    heads.write_bytes(b"x" * heads.stat().st_size)
    (results / "report" / "index.html").unlink()
    assert "checksum differs" in error_of(project.snakemake("--cores", "2"))
    assert surviving(kept) == kept
    project.run()
    assert surviving(kept) == kept

    shutil.rmtree(project.folder / ".snakemake")
    for record in results.rglob("*.json"):
        if record not in kept and not record.name.startswith("."):
            record.unlink()
    project.run()
    assert surviving(kept) == kept


def test_a_file_of_a_former_report_that_somebody_changed_is_kept(project):
    results = project.folder / "results"
    edited, untouched = results / "report" / "data" / "tiny-bert.js", results / "report/figures/cosine/tiny-bert/qk/self.svg"
    assert untouched.exists()
    edited.write_text("mine")
    write_manifest(project.folder / "config" / "models.tsv", {"tiny-llama": "models/llama"})
    project.run()
    assert edited.read_text() == "mine"
    assert not untouched.exists()


@pytest.mark.parametrize(
    "place",
    [
        "atlas/heads/model=tiny-llama/heads.parquet",
        "atlas/directions/tiny-bert.pt",
        "models/tiny-bert/self/qk/weights/layers-000-002.pt",
        "models/tiny-llama/self/qk/gram/row-001.json",
        "provenance/derived/tiny-bert.json",
        "seed/tiny-bert.json",
        "logs/merge/tiny-bert.log",
        "report/index.html",
        "report/data/tiny-bert.js",
        "report/figures/symmetry/tiny-llama/qk/self.svg",
    ],
)
def test_a_file_where_headgram_would_write_is_not_overwritten(project, place):
    """Nothing is lost, nothing is begun, and the sentence helps."""
    shutil.rmtree(project.folder / "results")
    path = project.folder / "results" / place
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    sentence = error_of(project.snakemake("--cores", "2", "--forceall"))
    assert f"results/{place} is in the way" in sentence
    assert path.read_text() == "mine"
    assert [file for file in (project.folder / "results").rglob("*") if file.is_file() and file.name[0] != "."] == [path]


@pytest.mark.parametrize("name", [".lock", ".sources.json", ".claims.json", ".plan.json"])
@pytest.mark.parametrize("kind", ["text", "link", "folder", "pipe"])
def test_what_lies_where_a_run_keeps_what_it_knows_is_not_overwritten(project, tmp_path, name, kind):
    path, diary = project.folder / "results" / name, tmp_path / "diary"
    path.unlink()
    diary.write_text("mine")
    match kind:
        case "text":
            path.write_text("mine")
        case "link":
            path.symlink_to(diary)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
    changed(project)
    sentence = error_of(project.snakemake("--cores", "2"))
    assert f"results/{name} is in the way" in sentence
    assert "move it elsewhere" in sentence
    assert diary.read_text() == "mine"
    if kind == "text":
        assert path.read_text() == "mine"
    assert os.path.lexists(path)


def test_moving_what_is_in_the_way_helps(project):
    results = project.folder / "results"
    shutil.rmtree(results)
    (results / "report" / "data").mkdir(parents=True)
    (results / "report" / "data" / "tiny-bert.js").write_text("mine")
    assert "move it elsewhere" in error_of(project.snakemake("--cores", "2"))
    (results / "report" / "data" / "tiny-bert.js").rename(results / "report" / "data" / "mine.js")
    project.run()
    assert (results / "report" / "data" / "mine.js").read_text() == "mine"


@pytest.mark.parametrize(
    "level", ["report", "report/figures/cosine", "atlas/heads/model=tiny-llama", "models/tiny-llama", "logs"]
)
def test_a_link_inside_results_is_refused(project, tmp_path, level):
    """By a run, before Snakemake makes or removes anything beyond it, and by `headgram verify`."""
    outside, folder = tmp_path / "outside", project.folder / "results" / level
    folder.rename(outside)
    kept = planted(outside)
    for path in outside.rglob("*"):
        if path.is_file():
            kept[path] = path.read_bytes()
    folder.symlink_to(outside)
    changed(project)
    sentence = error_of(project.snakemake("--cores", "2"))
    assert f"results/{level} is a symbolic link to {outside}" in sentence
    assert "put a folder in its place" in sentence
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == kept
    if level != "logs":
        verified = project.headgram("verify")
        assert verified.returncode != 0
        assert f"results/{level} is a symbolic link" in "".join(
            (verified.stdout + verified.stderr).replace("\n", " ").split("  ")
        )
    folder.unlink()
    shutil.copytree(outside, folder)
    project.run()


def test_the_results_folder_may_be_a_link_but_not_a_dangling_one(project, tmp_path):
    results = project.folder / "results"
    shutil.rmtree(results)
    results.symlink_to(tmp_path / "elsewhere")
    for arguments in (("-n",), ("--cores", "2")):
        sentence = error_of(project.snakemake(*arguments))
        assert f"The results folder results is a link to {tmp_path / 'elsewhere'}, which is not there" in sentence
    (tmp_path / "elsewhere").mkdir()
    project.run()
    assert (tmp_path / "elsewhere" / "report" / "index.html").exists()
    assert project.headgram("verify").returncode == 0


_OBSERVED = """
import json, os
if "{variable}" in os.environ:
    _fsync, _replace = os.fsync, os.replace
    def _say(*event):
        with open({log!r}, "a") as file:
            file.write(json.dumps([os.getpid(), *event]) + chr(10))
    def fsync(number):
        _say("flush", os.readlink(f"/proc/self/fd/{{number}}"))
        _fsync(number)
    def replace(source, target, **folders):
        _say("rename", os.path.abspath(source), os.path.abspath(target))
        _replace(source, target, **folders)
    os.fsync, os.replace = fsync, replace
"""


def test_every_file_of_a_run_is_on_the_disk_before_the_next_one_is_named(project):
    """The file's bytes, then its name: what a record names is there whenever the record is, also after a power cut."""
    log = project.folder / "events"
    (project.folder / "src" / "sitecustomize.py").write_text(_OBSERVED.format(variable=RESULTS, log=str(log)))
    changed(project)
    project.run()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    results = str(project.folder.resolve() / "results")
    by_process = {process: [event for number, *event in events if number == process] for process, *_ in events}
    renamed = set()
    for seen in by_process.values():
        for i, event in enumerate(seen):
            if event[0] == "rename" and event[2].startswith(results):
                source, target = event[1:]
                assert seen[i - 1] == ["flush", source]
                above = [str(folder) for folder in Path(target).parents if str(folder).startswith(results)]
                assert seen[i + 1 : i + 1 + len(above)] == [["flush", folder] for folder in above]
                renamed.add(target.removeprefix(results + "/"))
    assert {"atlas/heads/model=tiny-llama/heads.parquet", "provenance/tiny-bert.json", "report/index.json"} <= renamed
