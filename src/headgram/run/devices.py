"""Which device a job computes on, and the lease that keeps two jobs off the same one.

Snakemake's `--resources gpu=2` caps how many GPU jobs run at once, but assigns no device. Here every job takes an
advisory file lock for one device id; the kernel frees it when the job ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from headgram.errors import HeadgramError


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use: `CUDA_VISIBLE_DEVICES`, else all. Imports no CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def wants_gpu(device: str) -> bool:
    """Whether `auto`, `cpu` or `cuda` means a GPU. `cuda` does even where none is visible, as on a cluster's login node."""
    return device == "cuda" or (device == "auto" and bool(visible_gpus()))


def require_device(device: str) -> bool:
    """Whether `auto`, `cpu` or `cuda` means a GPU here.

    Raises
    ------
    HeadgramError
        If a GPU is asked for and none is visible.
    """
    if wants_gpu(device) and not visible_gpus():
        raise HeadgramError("device is 'cuda', but no GPU is visible here: use 'auto' or 'cpu', or check CUDA_VISIBLE_DEVICES")
    return wants_gpu(device)


@contextlib.contextmanager
def leased_device(on_gpu: bool) -> Iterator[str]:
    """Yield `cpu`, or `cuda` with one device held for the length of the block.

    Must be entered before the first CUDA call of the process: it narrows `CUDA_VISIBLE_DEVICES` to the device.

    Raises
    ------
    HeadgramError
        If a GPU is asked for and none is visible, as on a cluster's node without one.
    """
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CPU job never touches CUDA
        yield "cpu"
        return
    gpus = visible_gpus()
    if not gpus:
        raise HeadgramError(f"this job asks for a GPU, but none is visible on {platform.node()}: check where it was sent")
    folder = Path(tempfile.gettempdir(), f"headgram-{os.getuid()}", os.environ.get("SLURM_JOB_ID", "local"))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _first_free([filelock.FileLock(folder / f"gpu-{device}.lock") for device in gpus]) as index:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index]
        yield "cuda"


@contextlib.contextmanager
def _first_free(locks: list[filelock.BaseFileLock]) -> Iterator[int]:
    while True:
        for index, lock in enumerate(locks):
            with contextlib.suppress(filelock.Timeout), lock.acquire(timeout=0):
                yield index
                return
        time.sleep(0.2)
