"""What every script of the pipeline has in common: what it is told, its log, its device, its provenance, and how it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgram.errors import HeadgramError
from headgram.foreign import plain
from headgram.results.asked import Order, working_for
from headgram.results.files import open_new, refuse_links
from headgram.results.record import Provenance, Recipe
from headgram.run.devices import leased_device
from headgram.study.lock import LockedModel
from headgram.study.options import Config, load_config

if TYPE_CHECKING:
    from headgram.results.paths import Place
    from headgram.stages.lineage import FactorsAndDirections


#: The exit code of a process that Ctrl-C ended.
_INTERRUPTED = 130
#: Where a job is told what to do: its standard input.
_TOLD = 0


@dataclass(frozen=True)
class Job:
    """What a rule tells its job (`job` in `workflow/rules/common.smk`).

    Attributes
    ----------
    recipe
        Of the artifact that the job makes, as `Recipe.described` gives it.
    results, record
        The results folder, and the artifact's record relative to it.
    inputs, outputs
        Paths of files, or lists of them, by name.
    wildcards
        What stands in the rule's paths, such as the model's name.
    threads
        How many the job may use.
    gpu
        Whether it works on a GPU.
    facts
        What this rule alone tells.
    """

    recipe: Mapping[str, Any]
    results: str
    record: str
    inputs: Mapping[str, str | list[str]]
    outputs: Mapping[str, str | list[str]]
    wildcards: Mapping[str, str]
    threads: int
    gpu: bool
    facts: Mapping[str, Any]

    def read(self, *names: str) -> list[Path]:
        """The input files of these names."""
        return _paths(self.inputs, names)

    def write(self, *names: str) -> list[Path]:
        """The output files of these names."""
        return _paths(self.outputs, names)

    @property
    def around(self) -> tuple[Path, Path] | None:
        """What stands around the model's projections, and its record, if that is among the inputs."""
        if "around" not in self.inputs:
            return None
        around, record = self.read("around", "around_record")
        return around, record

    @property
    def model(self) -> LockedModel:
        """What the lock says of the model."""
        return LockedModel.model_validate(self.facts["entry"])


@contextlib.contextmanager
def running() -> Iterator[tuple[Job, Provenance, Config]]:
    """Run the body of a script, `SCRIPT LOG`, as the job that its standard input describes in JSON.

    Yields what the job is told, what its artifact comes from, and the options that its stage reads; all others have their
    defaults.

    Output goes to the log. A `HeadgramError` is printed as one sentence and ends the job with exit code 1; any other error leaves
    its traceback in the log. Ctrl-C ends it without one.
    """
    signal.signal(signal.SIGINT, lambda *_: sys.exit(_INTERRUPTED))
    with open(_TOLD, encoding="utf-8", closefd=False) as told:
        job = Job(**json.load(told))
    recipe = Recipe.read(job.recipe)
    try:
        with _output_to(Path(sys.argv[1])), leased_device(job.gpu) as device:
            _limit_threads(job.threads)
            _date_no_later_than_now(job.read(*job.inputs))
            with working_for(Order(Path(job.results), job.record, recipe.key)):
                yield job, _provenance(job, recipe, usable(device)), load_config(json.loads(recipe.config))
    except _Failed as failure:
        print(failure, file=sys.stderr)
        raise SystemExit(1) from None
    except HeadgramError as error:  # the log cannot be written
        print(f"headgram: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _paths(files: Mapping[str, str | list[str]], names: Iterable[str]) -> list[Path]:
    found = (files[name] for name in names)
    return [Path(path) for each in found for path in ([each] if isinstance(each, str) else each)]


class _Failed(Exception):
    """Ends a job whose log says why, in the same words as its message."""


def files_by_place(paths: Iterable[Path]) -> dict[tuple[str, ...], Path]:
    """Input files by stack, circuit, stage and name. The folder above is Snakemake's matter."""
    return {(*path.parts[-4:-1], path.stem): path for path in paths}


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send output to the log, and at its end why the block failed.

    All of it goes to the file that was opened first: the log of a newer run's job may be in its place by then.
    """
    refuse_links(log)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = io.TextIOWrapper(open_new(log), encoding="utf-8", line_buffering=True)
    except OSError as error:
        raise HeadgramError(f"The log {log} cannot be written: {error.strerror}.") from None
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                yield
            except HeadgramError as error:
                raise _Failed(f"headgram: {error}") from None
            except Exception:
                raise _Failed("\n".join(map(plain, traceback.format_exc().splitlines()))) from None
    except _Failed as failure:
        with contextlib.suppress(OSError):  # a full disk
            print(failure, file=file)
        raise
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _provenance(job: Job, recipe: Recipe, device: str) -> Provenance:
    stages = job.facts.get("stages")
    origin = {"lock": job.facts["entry"], "stages": stages} if stages else {}
    places = job.wildcards.get("model", ""), job.wildcards.get("stack"), job.wildcards.get("circuit")
    return Provenance(recipe, *places, device, origin=origin)


def _date_no_later_than_now(paths: Iterable[Path]) -> None:
    """Snakemake fails a job whose input is newer than its output, as after the clock was set back; here, dates mean nothing."""
    now = time.time()
    for path in paths:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime > now:
                os.utime(path, (now, now))


def usable(device: str) -> str:
    """The leased device, or `cpu` where this torch has no CUDA, although the machine has a GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("headgram: the installed torch cannot use the GPU; computing on the CPU")
        return "cpu"
    return device


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def both_sides(job: Job) -> list[dict[Place, FactorsAndDirections]]:
    """Of the earlier model and of the later one, the input files of a job about two models."""
    from headgram.stages.lineage import FactorsAndDirections

    sides = []
    for side, places in zip(("before", "after"), job.facts["parts"], strict=True):
        files = files_by_place(job.read(side))
        sides.append(
            {
                (circuit, stack): FactorsAndDirections(
                    [files[stack, circuit, "weights", name] for name in groups],
                    [files[stack, circuit, "eigen", name] for name in shards],
                )
                for circuit, stack, groups, shards in places
            }
        )
    return sides
