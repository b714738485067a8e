"""What happens when the Snakefile is read, and when a run begins."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
from pydantic import BaseModel, ConfigDict

from headgram.errors import HeadgramError
from headgram.foreign import parse_json, plain, read_bounded
from headgram.results.asked import NAME as ASKED
from headgram.results.asked import ask_for, given_to
from headgram.results.claims import NAME as CLAIMS
from headgram.results.claims import Writing, check_own, claim, settle
from headgram.results.files import RESULTS, everything_in, remove_temporaries, write_text
from headgram.run import forkserver, start_job
from headgram.run.project import FOLDER
from headgram.study.lineages import misfits
from headgram.study.lock import (
    LockedModel,
    changes,
    file_times,
    lock_path,
    missing_rows,
    read_lock,
    remove_temporaries_of,
    write_lock,
)
from headgram.study.manifest import Manifest, read_manifest
from headgram.study.options import load_config, read_options
from headgram.study.plan import Plan, left_out, make_plan

if TYPE_CHECKING:
    from headgram.run.progress import ProgressHandler

#: The options of a working folder.
OPTIONS = Path("config", "config.yaml")
#: A plan is made of objects that stay. Python looks for unused ones among them this seldom, which saves a tenth of the planning.
_RARELY = (100_000, 20, 100)
#: Names what starts a job, and the Python that runs it, in the environment of jobs.
_START, _PYTHON = "HEADGRAM_START", "HEADGRAM_PYTHON"
#: Where Snakemake remembers with what a file was made.
_MEMORY = Path(".snakemake", "metadata")
#: In the results folder: held by a run, and as old as the end of the latest.
_LOCK = ".lock"
#: Remembers, in the results folder, the files that were found to be what was locked.
_SEEN = ".sources.json"
#: What is remembered of thousands of models is smaller.
_LARGEST = 64 * 2**20


class _Remembered(BaseModel):
    """What Snakemake remembers of a file. It ends with a traceback where one of these fields is of another type."""

    model_config = ConfigDict(strict=True)

    rule: str | None = None
    input: list[str] | None = None
    log: list[str] | None = None
    shellcmd: str | None = None
    params: list[str] | None = None
    code: str | None = None
    record_format_version: int = 0
    conda_env: str | None = None
    container_img_url: str | None = None
    software_stack_hash: str | None = None
    job_hash: int | None = None
    starttime: float | None = None
    endtime: float | None = None
    incomplete: bool | None = None
    external_jobid: str | None = None
    input_checksums: dict[str, str | None] | None = None


class Run:
    """One reading of the Snakefile: the plan, and what starting it for real must do first.

    Reading writes nothing, so a dry run leaves no trace; `begin` does, once jobs are about to run. A job that was sent to
    another machine reads the Snakefile again, there: it trusts the lock (`is_job`), which the run that sent it has compared
    with the sources. So it looks at no source but its own, and models may be added to the manifest meanwhile. Jobs may run in
    environments that Snakemake makes (`in_environments`).
    """

    def __init__(
        self,
        options: Path | None,
        given: Mapping[str, Any],
        scripts: Path,
        is_job: bool = False,
        in_environments: bool = False,
    ) -> None:
        python = sys.executable
        _call_the_interpreter_by_name()
        gc.set_threshold(*_RARELY)
        config = load_config(read_options(options, given))
        self._given = given
        self._in_environments = in_environments
        self._manifest = Path(config.manifest)
        self._results = Path(config.results)
        self._new: dict[str, LockedModel] = {}
        self._held: filelock.BaseFileLock | None = None
        self._forkserver: subprocess.Popen[bytes] | None = None
        self._progress: ProgressHandler | None = None
        os.environ[RESULTS] = os.path.normpath(self._results.absolute())  # for the jobs of this run
        # For workflow/scripts/job.sh. An environment that Snakemake made for a rule has a Python of its own.
        os.environ |= {_START: start_job.__file__, _PYTHON: "python" if in_environments else python}
        manifest = read_manifest(self._manifest)
        entries = _locked(manifest) if is_job else self._checked(manifest, config.lineage.basis)
        self.plan: Plan = make_plan(entries, config, scripts, manifest.labels)

    def _checked(self, manifest: Manifest, basis: str) -> dict[str, LockedModel]:
        """The entries of the manifest's models, new ones resolved, old ones compared with their sources."""
        if self._results.is_symlink() and not self._results.exists():
            raise HeadgramError(
                f"The results folder {self._results} is a link to {self._results.readlink()}, which is not there: "
                "make that folder, or remove the link."
            )
        if self._results.exists() and not self._results.is_dir():
            raise HeadgramError(f"The results folder {self._results} is a file: give another one (--config results=…).")
        _check_snakemakes_memory(self._results)
        lock = read_lock(lock_path(self._manifest))
        missing = missing_rows(manifest.rows, lock)
        known = {row.name: lock.models[row.name] for row in manifest.rows if row not in missing}
        changed = [sentence for name, entry in known.items() for sentence in changes(name, entry, self._manifest)]
        problems: list[str] = []
        doubtful = self._doubtful(known)
        if missing or doubtful:
            from headgram.study.resolve import resolve_all, unlike_its_lock  # takes time that locked rows need not spend

            self._new, problems = resolve_all(missing, progress=lambda line: print(plain(line), file=sys.stderr))
            problems += [sentence for name in doubtful for sentence in unlike_its_lock(name, known[name], self._manifest)]
        entries = {**known, **self._new}
        manifest.check(*changed, *problems, *misfits(manifest.rows, entries, basis))
        return entries

    def _doubtful(self, known: Mapping[str, LockedModel]) -> list[str]:
        """Models whose files must be compared with the lock again.

        If an earlier run compared them: those whose files have another size or time since. If none did: those with a file younger
        than the lock. A file that is moved to its place may bring an old date along.
        """
        seen = _read_sightings(self._results / _SEEN)
        locked_at = lock_path(self._manifest).stat().st_mtime_ns if known else 0
        found = {name: file_times(entry) for name, entry in known.items() if entry.commit is None}
        return [
            name
            for name, times in found.items()
            if (_is_known(seen.get(name), known[name]) or any(time > locked_at for _, time in times.values()))
            and times
            and seen.get(name) != _sighting(known[name], times)
        ]

    def begin(self, workflow: Any, beside: Callable[[Any], Sequence[str]], on_gpu: bool) -> None:
        """Take the results folder, claim what jobs will write, remove what killed jobs left, write the lock, show the progress.

        Parameters
        ----------
        workflow
            Snakemake's, as the Snakefile knows it.
        beside
            The files that a job writes beside the outputs that Snakemake knows.
        on_gpu
            Whether jobs use a GPU.

        Raises
        ------
        HeadgramError
            If another run holds the results folder, it cannot be written, a folder in it is a symbolic link, or somebody's file
            lies where a job would write; or if jobs could not start.
        """
        _require_bash()
        try:
            self._results.mkdir(parents=True, exist_ok=True)
            for name in (_LOCK, _SEEN, CLAIMS, ASKED):
                check_own(self._results / name)
            self._held = filelock.FileLock(self._results / _LOCK, timeout=0)
            self._held.acquire()
            remove_temporaries(self._results / name for name in (_SEEN, CLAIMS))
            claim(self._results, self._writings(workflow, beside))
            ask_for(self._results, self.plan.records(), self._given)
            sightings = {name: _sighting(model.entry, file_times(model.entry)) for name, model in self.plan.models.items()}
            write_text(self._results / _SEEN, json.dumps(sightings, indent=1) + "\n")
        except filelock.Timeout:
            raise HeadgramError(
                f"Another run works on {self._results}: wait for it, or give this one another folder (--config results=…)."
            ) from None
        except NotImplementedError:
            raise HeadgramError(
                f"The file system of {self._results} has no locks, so that two runs could work there at once: "
                "keep results elsewhere (--config results=…)."
            ) from None
        except OSError as error:
            raise HeadgramError(f"The results folder {self._results} cannot be written ({error.strerror or error}).") from None
        remove_temporaries_of(lock_path(self._manifest))
        for sentence in left_out(self.plan):
            print(f"headgram: {sentence}", file=sys.stderr)
        if self._new:
            write_lock(lock_path(self._manifest), self._new)
        # Jobs elsewhere, or in an environment of their own, cannot be copies of a process of this one.
        if workflow.local_exec and not self._in_environments:
            self._forkserver = forkserver.start(keeps=not on_gpu)

        from headgram.run.progress import show_progress  # costs time that a dry run need not spend

        self._progress = show_progress(workflow)

    def end(self) -> None:
        """End the process that jobs are copies of, remove what is no longer part of the results, say how far the run came."""
        if self._forkserver:
            forkserver.stop(self._forkserver)
        if self._progress:
            self._progress.stop(last_line=True)
        if self._held:
            with contextlib.suppress(HeadgramError):  # a full disk: the next run does it
                settle(self._results)
            with contextlib.suppress(OSError):
                (self._results / _LOCK).touch()

    def _writings(self, workflow: Any, beside: Callable[[Any], Sequence[str]]) -> Iterator[Writing]:
        """What the jobs of a run will write in the results folder; what they keep in object storage is not on this disk.

        A workflow that uses headgram as a module has jobs of its own too.
        """
        records = {self._results / record for record in self.plan.records()}
        for job in workflow.dag.needrun_jobs():
            files = [Path(file) for file in (*job.output, *job.log) if not file.is_storage]
            for record in records.intersection(files):
                yield Writing(record, [*files, *map(Path, beside(job))])


def planned(given: Mapping[str, Any]) -> Plan:
    """The plan of this working folder: of its options, overruled by those given, and of its models that are locked."""
    config = load_config(read_options(OPTIONS, given))
    manifest = read_manifest(Path(config.manifest))
    return make_plan(_locked(manifest), config, FOLDER / "workflow" / "scripts", manifest.labels)


def asked_by_study(results: Path) -> dict[str, str] | None:
    """The keys that configuration and lock of this working folder ask for, by record, with the options of the latest run.

    None where they cannot be read, or speak of another results folder.
    """
    try:
        plan = planned(given_to(results))
        return plan.records() if os.path.realpath(plan.config.results) == os.path.realpath(results) else None
    except (HeadgramError, OSError):
        return None


def _locked(manifest: Manifest) -> dict[str, LockedModel]:
    """The entries of a manifest's models, as they are."""
    models = read_lock(lock_path(manifest.path)).models
    return {row.name: models[row.name] for row in manifest.rows if row.name in models}


def add_handlers(workflow: Any, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Have a workflow that uses headgram as a module begin and end headgram's run too: Snakemake calls the handlers of the main
    Snakefile alone. Its own still run; they must be defined above the module."""
    if vars(workflow).setdefault("_headgram", begin) is not begin:
        return  # every `use rule` reads the module again
    for name, action in (("_onstart", begin), ("_onsuccess", end), ("_onerror", end)):
        setattr(workflow, name, partial(_both, action, getattr(workflow, name)))


def _both(action: Callable[[], None], handler: Callable[[Any], Any], log: Any) -> None:
    action()
    handler(log)


def _call_the_interpreter_by_name() -> None:
    """Snakemake starts jobs by a shell command that begins with the interpreter's bare path, which a blank cuts in two."""
    if shlex.quote(sys.executable) != sys.executable:
        folder, sys.executable = os.path.split(sys.executable)
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])


def _require_bash() -> None:
    """Snakemake tells `workflow/scripts/job.sh` its job in arrays with names, which the Bash of macOS does not know."""
    told = ["bash", "-c", "declare -A job=([name]=value)"]
    if subprocess.run(told, stderr=subprocess.DEVNULL).returncode:
        raise HeadgramError("Jobs are started by Bash 4 or newer, and `bash` is an older one here: put a newer one on the PATH.")


def _check_snakemakes_memory(results: Path) -> None:
    """Refuse files of Snakemake's at which it would end with a traceback, whatever it is asked for, and what is no folder in it.

    Only files that changed after the latest run's end are opened, whatever date somebody gave them: Snakemake itself changes none
    then, unless it was killed, and there may be many.
    """
    for place in (_MEMORY.parent, *sorted(path for path in _MEMORY.parent.glob("*") if "." not in path.name)):
        if os.path.lexists(place) and not place.is_dir():
            kind = "a link to what is not there" if place.is_symlink() and not place.exists() else "no folder"
            raise HeadgramError(
                f"{place}, where Snakemake keeps what it knows of earlier runs, is {kind}: move it elsewhere, or delete it, "
                f"and run again. What is finished stays so: the records in {results} tell."
            )
    lock = results / _LOCK
    ended = lock.stat().st_mtime_ns if lock.exists() else 0
    for path in everything_in(_MEMORY):
        try:
            state = path.lstat()
            if stat.S_ISDIR(state.st_mode) or (stat.S_ISREG(state.st_mode) and state.st_ctime_ns <= ended):
                continue
            _Remembered.model_validate(json.loads(read_bounded(path, _LARGEST).decode()))
        except json.JSONDecodeError:
            continue  # Snakemake passes over it
        except (OSError, ValueError, RecursionError):
            raise HeadgramError(
                f"{path}, where Snakemake remembers an earlier run, is damaged: delete the folder {_MEMORY}, "
                f"and run again. What is finished stays so: the records in {results} tell."
            ) from None


def _read_sightings(path: Path) -> dict[str, Any]:
    """What earlier runs remember; nothing if that is lost or damaged, for it can be found again."""
    try:
        content = parse_json(read_bounded(path, _LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_known(sighting: Any, entry: LockedModel) -> bool:
    """Whether it tells of this very entry of the lock."""
    return isinstance(sighting, list) and sighting[:1] == [entry.fingerprint]


def _sighting(entry: LockedModel, times: Mapping[str, tuple[int, int]]) -> list[Any]:
    """What is remembered of a source whose content was compared with its lock, in JSON's terms."""
    return [entry.fingerprint, {name: list(state) for name, state in times.items()}]
