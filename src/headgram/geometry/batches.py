"""Work in batches that fit in memory: a CPU takes small pieces one by one, a GPU all at once."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from headgram.errors import HeadgramError

#: Devices on which one head after the other is as fast as all at once.
ONE_BY_ONE = ("cpu",)

#: Bytes of the float64 factors of so many heads as are worked on together: on a CPU they should stay in a cache.
PIECE_BYTES = {"cpu": 16 * 2**20, "cuda": 2**30}

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


def at_once(device: torch.device) -> bool:
    """Whether a device wants many heads at once."""
    return device.type not in ONE_BY_ONE


def in_batches(indices: range, size: int, measure: Callable[[slice], Result]) -> Iterator[Result]:
    """Results of at most `size` neighbouring indices at a time, in order; half as many where memory runs out.

    Raises
    ------
    HeadgramError
        If memory does not suffice for one.
    """
    start, released = indices.start, False
    while start < indices.stop:
        run = slice(start, min(start + size, indices.stop))
        try:
            result = measure(run)
        except (RuntimeError, MemoryError) as error:
            if not _is_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        else:
            yield result
            start, released = run.stop, False
            continue
        # Outside of the handler, which would keep what the failed attempt holds.
        _release()
        if not released:  # torch and CuPy each keep what they may use again, and the other may need
            released = True
            continue
        count = run.stop - run.start
        if count == 1:
            raise HeadgramError(f"There is too little memory for one head ({reason}): use another device.")
        size, released = count // 2, False
        _log.warning("headgram: memory ran out with %d heads at once; going on with %d", count, size)


def _is_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Of torch; of CuPy, whose error is a MemoryError; of the libraries below, which only say so."""
    said = any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation"))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or said


def _release() -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing, where CUDA was not used
    if cupy := sys.modules.get("cupy"):
        cupy.get_default_memory_pool().free_all_blocks()
