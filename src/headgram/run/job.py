"""What every script of the pipeline has in common: its log, its device, its provenance, and how it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgram.errors import HeadgramError
from headgram.foreign import plain
from headgram.results.files import open_new, refuse_links
from headgram.run.forkserver import hand_over

if TYPE_CHECKING:
    from headgram.results.paths import Place
    from headgram.results.record import Identity, Provenance
    from headgram.stages.lineage import FactorsAndDirections
    from headgram.study.options import Config


#: The exit code of a process that Ctrl-C ended.
_INTERRUPTED = 130


@contextlib.contextmanager
def running(snakemake: Any) -> Iterator[tuple[Provenance, Config]]:
    """Run the body of a script as a job; in a process that has imported torch already, if the run has one.

    Yields what its artifact comes from, and the options that its stage reads; all others have their defaults.

    Output goes to the rule's log. A `HeadgramError` is printed as one sentence and ends the job with exit code 1; any
    other error leaves its traceback in the log. Ctrl-C ends it without one.
    """
    signal.signal(signal.SIGINT, lambda *_: sys.exit(_INTERRUPTED))
    hand_over(Path(sys.argv[0]))
    # Only now: a script that hands itself over need not wait for it.
    from headgram.results.asked import Order, working_for
    from headgram.results.record import Identity
    from headgram.run.devices import leased_device
    from headgram.study.options import load_config

    try:
        with _output_to(Path(snakemake.log[0])), leased_device(bool(snakemake.resources.get("gpu", 0))) as device:
            _limit_threads(snakemake.threads)
            _date_no_later_than_now(snakemake.input)
            identity = Identity.read(json.loads(snakemake.params.identity))
            results, record = snakemake.params.order
            with working_for(Order(Path(results), record, identity.key)):
                yield _provenance(snakemake, identity, usable(device)), load_config(json.loads(identity.config))
    except _Failed as failure:
        print(failure, file=sys.stderr)
        raise SystemExit(1) from None
    except HeadgramError as error:  # the log cannot be written
        print(f"headgram: {error}", file=sys.stderr)
        raise SystemExit(1) from None


class _Failed(Exception):
    """Ends a job whose log says why, in the same words as its message."""


def by_place(paths: Iterable[str]) -> dict[tuple[str, ...], Path]:
    """Input files by stack, circuit, stage and name. The folder above is Snakemake's matter."""
    return {(*path.parts[-4:-1], path.stem): path for path in map(Path, paths)}


def around_of(inputs: Any) -> tuple[Path, Path] | None:
    """What stands around a model's projections, and its record, if that is among a job's inputs."""
    return (Path(inputs.around), Path(inputs.around_record)) if "around" in inputs.keys() else None  # noqa: SIM118


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


def _provenance(snakemake: Any, identity: Identity, device: str) -> Provenance:
    from headgram.results.record import Provenance

    origin = {}
    if "stages" in snakemake.params.keys():  # noqa: SIM118  (Snakemake's params are a list with names)
        stages: dict[str, dict[str, Any]] = {}
        for (stage, circuit), found in snakemake.params.stages.items():
            stages.setdefault(stage, {})[circuit] = found.described()
        origin = {"lock": snakemake.params.entry.model_dump(mode="json"), "stages": stages}
    places = snakemake.wildcards.get("model", ""), snakemake.wildcards.get("stack"), snakemake.wildcards.get("circuit")
    return Provenance(identity, *places, device, origin=origin)


def _date_no_later_than_now(paths: Iterable[str]) -> None:
    """Snakemake fails a job whose input is newer than its output, as after the clock was set back; here, dates mean nothing."""
    now = time.time()
    for path in map(Path, paths):
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


def both_sides(snakemake: Any) -> list[dict[Place, FactorsAndDirections]]:
    """Of the earlier model and of the later one, the input files of a job about two models."""
    from headgram.stages.lineage import FactorsAndDirections

    sides = []
    for side, places in zip(("before", "after"), json.loads(snakemake.params.parts), strict=True):
        files = by_place(snakemake.input[side])
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
