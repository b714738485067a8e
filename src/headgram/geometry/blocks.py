"""Work in blocks that fit in memory: a CPU takes small ones one after the other, a GPU as much as fits."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from headgram.errors import HeadgramError
from headgram.geometry.costs import BLOCK_BYTES

#: Devices on which one head after the other is as fast as all at once.
ONE_BY_ONE = ("cpu",)

#: Bytes of the float64 factors of so many heads as are worked on together: on a CPU they should stay in a cache.
FACTOR_BYTES = {"cpu": 16 * 2**20, "cuda": 2**30}

#: Bytes of a block of heads that is not halved: few models have a head of more.
LEAST_BLOCK = 2**20

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class TooLittleMemory(HeadgramError, MemoryError):
    """Memory does not suffice for one head. Where others are held beside it, it may suffice for fewer of them."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"There is too little memory for one head ({reason}): use another device.")
        self.reason = reason


def at_once(device: torch.device) -> bool:
    """Whether a device wants many heads at once."""
    return device.type not in ONE_BY_ONE


def by_blocks(indices: range, size: int, measure: Callable[[slice], Result]) -> Iterator[Result]:
    """Results of at most `size` neighbouring indices at a time, in order; half as many where memory runs out.

    Raises
    ------
    TooLittleMemory
        If memory does not suffice for one.
    """
    start = indices.start
    while start < indices.stop:

        def next_heads(count: int, start: int = start) -> Result:
            return measure(slice(start, start + count))

        size, result = _fitting(min(size, indices.stop - start), 1, "heads", next_heads)
        yield result
        start += size


def in_fitting_blocks(device: str, measure: Callable[[int], Result]) -> Result:
    """What is measured of blocks of heads, given how many bytes a block may have; of smaller ones where memory runs out.

    Raises
    ------
    TooLittleMemory
        If memory does not suffice for the smallest.
    """
    return _fitting(BLOCK_BYTES[torch.device(device).type], LEAST_BLOCK, "bytes of heads", measure)[1]


def _fitting(size: int, least: int, what: str, measure: Callable[[int], Result]) -> tuple[int, Result]:
    """How many can be measured at once, `size` or half as many and so on, and the result."""
    released = False
    while True:
        try:
            return size, measure(size)
        except (RuntimeError, MemoryError) as error:
            if not _is_of_memory(error):
                raise
            reason = error.reason if isinstance(error, TooLittleMemory) else str(error).partition("\n")[0]
        # Outside of the handler, which would keep what the failed attempt holds.
        _release()
        if not released:  # torch and CuPy each keep what they may use again, and the other may need
            released = True
        elif size <= least:
            raise TooLittleMemory(reason)
        else:
            _log.warning("headgram: memory ran out with %d %s at once; going on with %d", size, what, size // 2)
            size, released = size // 2, False


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
