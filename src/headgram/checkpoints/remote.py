"""Safetensors files at the hub: only headers and the asked tensors' ranges are fetched, into memory."""

from __future__ import annotations

import hashlib
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from operator import itemgetter
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from headgram.checkpoints.hub import HubFile, RemoteLocation, fetch_into
from headgram.checkpoints.local_file import Span
from headgram.checkpoints.safetensors_header import TensorPlace, read_header
from headgram.checkpoints.safetensors_store import Safetensors
from headgram.checkpoints.sources import HUB_DIGEST
from headgram.checkpoints.stores import Piece

_A = TypeVar("_A")
_B = TypeVar("_B")
_CONNECTIONS = 8
#: One request fetches at most this much; a large tensor comes in parts, in parallel.
_PART_BYTES = 64 * 2**20
#: Bytes between two wanted tensors are fetched along if they are fewer than this share of the tensors.
_WASTE = 0.01
#: Between two pieces of one tensor, so many bytes are fetched along: a request takes longer than they do.
_REQUEST = 2**16


class RemoteSafetensorsStore(Safetensors[HubFile]):
    """The safetensors files of a repository at a commit.

    Opening it reads the headers. `prefetch` fetches many tensors in parallel; a large one stays in memory until it is read.
    """

    def __init__(self, location: RemoteLocation) -> None:
        files = [location.file(name) for name in location.weights]
        headers = _in_parallel(_header, files)
        super().__init__({file.name: (file, found) for file, found in zip(files, headers, strict=True)}, location.choice.index)

    def prefetch(self, pieces: Iterable[Piece]) -> None:
        self._kept.add(pieces)

    def _read(self, wanted: Mapping[Piece, tuple[HubFile, list[Span]]]) -> dict[Piece, memoryview]:
        requests = plan_requests(wanted.values())
        buffers = [memoryview(bytearray(stop - start)) for _, start, stop in requests]
        parts = [
            (file, start + at, buffer[at : at + _PART_BYTES])
            for (file, start, _), buffer in zip(requests, buffers, strict=True)
            for at in range(0, len(buffer), _PART_BYTES)
        ]
        with _progress() as progress:
            task = progress.add_task("weights", total=sum(map(len, buffers)))
            _in_parallel(lambda part: fetch_into(*part, advance=lambda count: progress.advance(task, count)), parts)
        of_file: dict[HubFile, list[tuple[int, memoryview]]] = {}
        for (file, start, _), buffer in zip(requests, buffers, strict=True):
            of_file.setdefault(file, []).append((start, buffer))

        def bytes_at(file: HubFile, span: Span) -> memoryview:
            begin, buffer = of_file[file][bisect_right(of_file[file], span[0], key=itemgetter(0)) - 1]
            return buffer[span[0] - begin : span[1] - begin]

        found = {piece: [bytes_at(file, span) for span in spans] for piece, (file, spans) in wanted.items()}
        return {piece: some[0] if len(some) == 1 else memoryview(b"".join(some)) for piece, some in found.items()}

    def pin(self, names: Iterable[str]) -> str:
        """Digest of the hub's hashes of the files, and the tensors' places there."""
        state = hashlib.blake2b(digest_size=16)
        for name in names:
            file, place = self._home[name]
            state.update(f"{file.etag} {file.size} {place.dtype} {place.shape} {place.start}\n".encode())
        return HUB_DIGEST + state.hexdigest()


def plan_requests(wanted: Iterable[tuple[HubFile, Sequence[Span]]]) -> list[tuple[HubFile, int, int]]:
    """The ranges to fetch, file by file, from first to last; neighbours with little between them share one."""
    requests: list[tuple[HubFile, int, int]] = []
    spans = ((file, *span, len(spans) > 1) for file, spans in wanted for span in spans)
    for file, start, stop, of_many in sorted(spans, key=lambda span: (span[0].name, *span[1:])):
        last = requests[-1] if requests else None
        waste = max(_WASTE * (stop - start), _REQUEST if of_many else 0)
        if last and last[0] == file and start - last[2] <= waste:
            requests[-1] = (file, last[1], max(last[2], stop))
        else:
            requests.append((file, start, stop))
    return requests


def _header(file: HubFile) -> dict[str, TensorPlace]:
    def read(start: int, stop: int) -> bytes:
        found = bytearray(stop - start)
        fetch_into(file, start, memoryview(found))
        return bytes(found)

    return read_header(read, file.size, str(file))


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
