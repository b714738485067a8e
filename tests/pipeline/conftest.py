"""A copy of the workflow in a folder of its own, with tiny models, run by the real snakemake."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tiny import write_bert, write_llama, write_manifest

pytest.register_assert_rewrite("pipeline.page_checks")

ROOT = Path(__file__).parents[2]
#: On `PYTHONPATH`, pretends GPUs.
WITH_STAND_IN = Path(__file__).parent / "with_stand_in"
_IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Project:
    """A folder in which `snakemake` runs, with its own copy of the sources."""

    folder: Path
    patience: float = 600  # seconds that a run may take

    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.folder / "src"), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "snakemake", *arguments]

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=self.patience,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """A run that must succeed."""
        done = self.snakemake("--cores", "2", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def planned(self, *arguments: str) -> set[str]:
        """The jobs that a dry run would start, without the final `all`: their messages."""
        done = self.snakemake("-n", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        jobs = set(re.findall(r"^Job \d+: (.*)$", done.stdout + done.stderr, re.MULTILINE))
        return jobs - {"Every table of this study is there"}

    def headgram(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "headgram", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, text=True)

    def copy(self, folder: Path) -> "Project":
        """The same project elsewhere, dates of files included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return replace(self, folder=folder)

    def tables(self) -> dict[str, bytes]:
        """Everything that a user reads, byte by byte."""
        results = self.folder / "results"
        paths = [path for part in ("atlas", "seed") for path in (results / part).rglob("*") if path.is_file()]
        return {str(path.relative_to(results)): path.read_bytes() for path in paths}

    def records(self) -> dict[Path, tuple[int, int]]:
        """Every finished artifact's record: inode and time, which change if it is made again."""
        results = self.folder / "results"
        found = [path for part in ("models", "provenance") for path in (results / part).rglob("*.json")]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


class OnStandIn(Project):
    """Its jobs see two pretended GPUs, which refuse what real ones refuse."""

    def environment(self) -> dict[str, str]:
        path = [self.folder / "src", WITH_STAND_IN, ROOT / "tests"]
        return super().environment() | {"PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": "0,1"}

    def command(self, *arguments: str) -> list[str]:
        return super().command("--resources", "gpu=2", *arguments)


def new_project(folder: Path) -> Project:
    folder.mkdir(parents=True)
    for name in ("src", "workflow", "profiles", "envs"):
        shutil.copytree(ROOT / name, folder / name, ignore=_IGNORED)
    shutil.copy(ROOT / "Snakefile", folder / "Snakefile")
    (folder / "config").mkdir()
    shutil.copy(ROOT / "config" / "config.yaml", folder / "config" / "config.yaml")
    return Project(folder)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture
def project(tmp_path) -> Project:
    """Two tiny models, a llama and a bert, cut into several jobs each; sources are relative to the folder."""
    return tiny_project(tmp_path / "project")


def tiny_project(folder: Path) -> Project:
    project = new_project(folder)
    write_llama(folder / "models" / "llama")
    write_bert(folder / "models" / "bert")
    write_manifest(folder / "config" / "models.tsv", {"tiny-llama": "models/llama", "tiny-bert": "models/bert"})
    edit(folder / "config" / "config.yaml", "layers_per_job: auto", "layers_per_job: 2")
    edit(folder / "config" / "config.yaml", "layers_per_tile: auto", "layers_per_tile: 2")
    edit(folder / "config" / "config.yaml", "report:\n  enabled: true", "report:\n  enabled: false")
    return project


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Project:
    """The tiny project after a complete run. Not to be changed: take a copy."""
    project = tiny_project(tmp_path_factory.mktemp("finished") / "project")
    project.run()
    return project


def small_project(folder: Path) -> Project:
    """One tiny model in five jobs, for what makes jobs slow."""
    project = new_project(folder)
    write_bert(folder / "models" / "bert")
    write_manifest(folder / "config" / "models.tsv", {"small-bert": "models/bert"})
    return project


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Project:
    """The small project after a complete run. Not to be changed."""
    project = small_project(tmp_path_factory.mktemp("small") / "project")
    project.run()
    return project


def default_project(folder: Path) -> Project:
    """The default manifest, with its committed lock."""
    project = new_project(folder)
    for name in ("models.tsv", "models.lock.json"):
        shutil.copy(ROOT / "config" / name, folder / "config" / name)
    return project


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Path:
    """Results of the default manifest, from its committed lock. Not to be changed."""
    project = default_project(tmp_path_factory.mktemp("real") / "project")
    # Both models take one job per stage and circuit, then six; then there are the page without models and the report.
    assert len(project.planned()) == 2 * (2 * 3 + 6) + 2
    project.run()
    assert (project.folder / "config" / "models.lock.json").read_bytes() == (ROOT / "config" / "models.lock.json").read_bytes()
    return project.folder / "results"
