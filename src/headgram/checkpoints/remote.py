"""Safetensors files at the hub: only headers and the asked tensors' ranges are fetched, into memory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from headgram.checkpoints.homes import Homes
from headgram.checkpoints.hub import HubFile, RemoteLocation, fetch_into
from headgram.checkpoints.safetensors_header import PREFIX, TensorPlace, header_length, parse_header
from headgram.checkpoints.sources import HUB_DIGEST
from headgram.checkpoints.stores import DTYPES, TensorStore
from headgram.errors import HeadgramError

_A = TypeVar("_A")
_B = TypeVar("_B")
_CONNECTIONS = 8
#: Fetched at once in the hope that it holds the whole header, which saves a request per file.
_HEADER_GUESS = 8192
#: One request fetches at most this much; a large tensor comes in parts, in parallel.
_PART_BYTES = 64 * 2**20
#: Tensors up to this size stay in memory when they are read: scales and shapes, which are asked for more than once.
_KEPT_BYTES = 2**16
#: Bytes between two wanted tensors are fetched along if they are fewer than this share of the tensors.
_WASTE = 0.01


@dataclass(frozen=True)
class Span:
    """Bytes `[start, stop)` of a file, fetched together, and the names of the tensors in them."""

    file: HubFile
    start: int
    stop: int
    names: tuple[str, ...]


class RemoteSafetensorsStore(TensorStore):
    """The safetensors files of a repository at a commit.

    Opening it reads the headers. `prefetch` fetches many tensors in parallel; a large one stays in memory until it is read.
    """

    def __init__(self, location: RemoteLocation) -> None:
        files = [location.file(name) for name in location.weights]
        self._fetched: dict[str, memoryview] = {}
        headers = zip(files, _in_parallel(_read_header, files), strict=True)
        places = {file.name: {name: (file, place) for name, place in header.items()} for file, header in headers}
        self._home = Homes(places, location.choice.index)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def names(self) -> Collection[str]:
        return self._home.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name][1].shape

    def stored(self, name: str) -> str:
        return self._home[name][1].dtype

    def nbytes(self, name: str) -> int:
        place = self._home[name][1]
        return place.stop - place.start

    def prefetch(self, names: Iterable[str]) -> None:
        missing = {name: self._home[name] for name in names if name not in self._fetched}
        if not missing:
            return
        spans = plan_spans(missing)
        buffers = [memoryview(bytearray(span.stop - span.start)) for span in spans]
        parts = [
            (span.file, span.start + at, buffer[at : at + _PART_BYTES])
            for span, buffer in zip(spans, buffers, strict=True)
            for at in range(0, len(buffer), _PART_BYTES)
        ]
        with _progress() as progress:
            task = progress.add_task("weights", total=sum(map(len, buffers)))
            _in_parallel(lambda part: fetch_into(*part, advance=lambda count: progress.advance(task, count)), parts)
        for span, buffer in zip(spans, buffers, strict=True):
            for name in span.names:
                place = self._home[name][1]
                self._fetched[name] = buffer[place.start - span.start : place.stop - span.start]

    def pin(self, names: Iterable[str]) -> str:
        """Digest of the hub's hashes of the files, and the tensors' places there."""
        state = hashlib.blake2b(digest_size=16)
        for name in names:
            file, place = self._home[name]
            state.update(f"{file.etag} {file.size} {place.dtype} {place.shape} {place.start}\n".encode())
        return HUB_DIGEST + state.hexdigest()

    def raw(self, name: str) -> memoryview:
        self.prefetch([name])
        return self._fetched[name]

    def slices(self, name: str, rows: int) -> Iterator[Tensor]:
        dtype, (file, place) = DTYPES[self.dtype(name)], self._home[name]
        count, *others = place.shape
        size = (place.stop - place.start) // max(1, count)  # bytes of a row
        for first in range(0, count, rows):
            some = min(rows, count - first)
            stored = bytearray(some * size)
            fetch_into(file, place.start + first * size, memoryview(stored))
            yield torch.frombuffer(stored, dtype=dtype).reshape(some, *others)

    def part(self, name: str) -> Tensor:
        place = self._home[name][1]
        if place.dtype not in DTYPES:
            raise HeadgramError(f"tensor {name} is stored as {place.dtype}, a type that headgram does not know")
        self.prefetch([name])
        # A copy: what lies beside it in the buffer can be freed then, and offsets may be unaligned.
        stored = bytearray(self._fetched.pop(name))
        if len(stored) <= _KEPT_BYTES:
            self._fetched[name] = memoryview(stored)
        if not stored:
            return torch.empty(place.shape, dtype=DTYPES[place.dtype])
        return torch.frombuffer(stored, dtype=DTYPES[place.dtype]).reshape(place.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._fetched.clear()


def plan_spans(places: dict[str, tuple[HubFile, TensorPlace]]) -> list[Span]:
    """The ranges to fetch for some tensors; neighbours with little between them share one."""
    spans: list[Span] = []
    for name, (file, place) in sorted(places.items(), key=lambda item: (item[1][0].name, item[1][1].start)):
        last = spans[-1] if spans else None
        if last and last.file == file and place.start - last.stop <= _WASTE * (place.stop - place.start):
            spans[-1] = Span(file, last.start, max(last.stop, place.stop), (*last.names, name))
        else:
            spans.append(Span(file, place.start, place.stop, (name,)))
    return spans


def _read_header(file: HubFile) -> dict[str, TensorPlace]:
    first = memoryview(bytearray(min(_HEADER_GUESS, file.size)))
    fetch_into(file, 0, first)
    length = header_length(bytes(first[:PREFIX]), file.size, str(file))
    header = memoryview(bytearray(length))
    known = first[PREFIX : PREFIX + length]
    header[: len(known)] = known
    if len(known) < length:
        fetch_into(file, PREFIX + len(known), header[len(known) :])
    return parse_header(bytes(header), file.size, str(file))


def _in_parallel(work: Callable[[_A], _B], items: Sequence[_A]) -> list[_B]:
    """The results in order; the first failure ends everything."""
    pool = ThreadPoolExecutor(_CONNECTIONS)
    try:
        futures = [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _progress() -> Progress:
    """A bar on a terminal, silence elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
