"""The built wheel in an environment of its own: a project of one's own, and a workflow of somebody else's.

Environment and project lie where folders have blanks, quotes and letters of all kinds, behind a link, deep down.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import headgram
from pipeline.conftest import ROOT
from tiny import write_bert, write_manifest

_MODULE = """
import headgram as installed

onstart:
    print("their run begins")

module headgram:
    snakefile: installed.SNAKEFILE
    config: config["headgram"]

use rule * from headgram as headgram_*

rule theirs:
    default_target: True
    input: rules.headgram_all.input
    output: "theirs.txt"
    shell: "touch {output}"
"""


@dataclass(frozen=True)
class Environment:
    """A Python environment that holds headgram's wheel, and what it needs from the one that runs the tests."""

    folder: Path

    def __call__(self, where: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
        """Run a command of the environment in a folder."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
        path = self.folder / "bin" / command[0]
        return subprocess.run([path, *command[1:]], cwd=where, env=clean, capture_output=True, text=True, timeout=600)

    def succeeds(self, where: Path, *command: str) -> str:
        done = self(where, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder that many a command trips over."""
    folder = tmp_path_factory.mktemp("installed")
    deep = folder.joinpath(*["it's a »very« long päth, 模型"] * 12)
    deep.mkdir(parents=True)
    (folder / "a link").symlink_to(deep)
    return folder / "a link"


@pytest.fixture(scope="module")
def environment(place, tmp_path_factory) -> Environment:
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT], check=True)
    folder = place / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    subprocess.run([*pip, "--python", folder / "bin" / "python", "install", "--no-deps", *wheels.iterdir()], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib"))
    python = shlex.quote(str(folder / "bin" / "python"))
    (folder / "bin" / "snakemake").write_text(f'#!/bin/sh\nexec {python} -m snakemake "$@"\n')
    (folder / "bin" / "snakemake").chmod(0o755)
    return Environment(folder)


def test_a_project_of_ones_own(environment, place):
    where = environment.succeeds(place, "python", "-c", "import headgram; print(headgram.SNAKEFILE)")
    assert Path(where.strip()).parts[-3:] == ("headgram", "pipeline", "Snakefile")
    assert re.fullmatch(r"headgram \d+\.\d+\.\d+\n", environment.succeeds(place, "headgram", "--version"))
    environment.succeeds(place, "headgram", "init", "my study")
    project = place / "my study"
    again = environment(place, "headgram", "init", "my study")
    assert (again.returncode, "is there already" in again.stderr) == (1, True)
    assert "there is no Snakefile in" in environment(place, "headgram", "run").stderr

    write_bert(project / "ein modèle")
    write_manifest(project / "config" / "models.tsv", {"bert": "ein modèle"})
    assert "added 'bert-null'" in environment.succeeds(project, "headgram", "null", "bert")
    planned = environment.succeeds(project, "headgram", "run", "-n", "--gpus", "0")
    assert "\nsnakemake --cores all --resources gpu=0 -n\n" in f"\n{planned}"
    assert "profiles/default" in planned
    assert re.search(r"^extract +2$", planned, re.MULTILINE)
    assert "locked" not in planned
    assert not (project / "results").exists()

    said = environment.succeeds(project, "headgram", "run", "--cores", "2", "-q")
    assert re.search(r"^headgram: (\d+) of \1 jobs ", said, re.MULTILINE), said
    assert (project / "results" / "report" / "index.html").is_file()
    assert "Nothing to be done" in environment.succeeds(project, "snakemake", "--cores", "2", "--resources", "gpu=2")
    assert "bert" in environment.succeeds(project, "headgram", "show")
    assert "all as they were written" in environment.succeeds(project, "headgram", "verify")
    assert json.loads((project / "config" / "models.lock.json").read_text())["models"].keys() > {"bert", "bert-null"}

    atlas = headgram.open_atlas(project / "results")
    assert atlas.where(twin="1").models == ["bert-null"]
    (model, twin) = (atlas.spectra("qk").query("model == @name") for name in ("bert", "bert-null"))
    np.testing.assert_allclose(twin["singular_value"], model["singular_value"], rtol=1e-5, atol=1e-5)
    (model, twin) = (atlas.heads("qk").query("model == @name") for name in ("bert", "bert-null"))
    assert (np.abs(model["symmetry"].to_numpy() - twin["symmetry"].to_numpy()) > 1e-6).all()


@pytest.mark.parametrize(
    ("typed", "completed"), [("headgram nu", {"null"}), ("headgram in", {"init", "inspect"}), ("headgram null --s", {"--seed"})]
)
def test_a_shell_completes_commands_and_options(environment, place, typed, completed):
    asked = {"_HEADGRAM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert set(environment(place, "headgram", **asked).stdout.split()) == completed
    installed = environment(place, "headgram", _HEADGRAM_COMPLETE="source_bash").stdout
    assert re.search(r"^complete .*headgram$", installed, re.MULTILINE)


def test_what_snakedeploy_writes_plans_the_default_study(environment, place):
    """`snakedeploy deploy-workflow` copies config and profiles, and writes a Snakefile from the template below (0.17)."""
    folder = place / "deployed"
    for name in ("config", "profiles"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "workflow").mkdir()
    where = environment.succeeds(place, "python", "-c", "import headgram; print(headgram.SNAKEFILE)").strip()
    (folder / "workflow" / "Snakefile").write_text(
        'from snakemake.utils import min_version\nmin_version("6.10.0")\nconfigfile: "config/config.yaml"\n'
        f"module headgram:\n    snakefile:\n        {where!r}\n    config:\n        config\nuse rule * from headgram\n"
    )
    planned = environment.succeeds(folder, "snakemake", "-n")
    assert re.search(r"^extract +4$", planned, re.MULTILINE)
    assert re.search(r"^all +1$", planned, re.MULTILINE)
    assert "profiles/default" in planned


def test_a_module_of_somebody_elses_workflow(environment, place):
    """Their configuration is not ours, and their handlers still run."""
    theirs = place / "their workflow"
    (theirs / "config").mkdir(parents=True)
    (theirs / "config" / "config.yaml").write_text("an option: of theirs\n")
    (theirs / "Snakefile").write_text(_MODULE)
    write_bert(theirs / "bert", layers=1)
    write_manifest(theirs / "list.tsv", {"b": "bert"})
    options = {"manifest": "list.tsv", "results": "out/heads", "report": {"enabled": False}}
    said = environment.succeeds(theirs, "snakemake", "--cores", "2", "--config", f"headgram={json.dumps(options)}")
    assert "their run begins" in said
    assert re.search(r"^headgram: (\d+) of \1 jobs in ", said, re.MULTILINE), said
    assert (theirs / "theirs.txt").exists()
    assert (theirs / "out" / "heads" / "provenance" / "b.json").is_file()
    assert (theirs / "out" / "heads" / ".claims.json").is_file()
