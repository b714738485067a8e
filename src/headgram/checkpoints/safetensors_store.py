"""Safetensors files on this machine."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from headgram.checkpoints.homes import Homes
from headgram.checkpoints.safetensors_header import check_header
from headgram.checkpoints.stores import TensorStore, bytes_of, known_dtype
from headgram.errors import HeadgramError


class SafetensorsStore(TensorStore):
    """One or several safetensors files, mapped into memory."""

    def __init__(self, paths: Mapping[str, Path], index: Mapping[str, str] | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        self._stack = ExitStack()
        files: dict[str, dict[str, Any]] = {}
        for name, path in paths.items():
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise HeadgramError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
            check_header(path)
            files[name] = dict.fromkeys(file.keys(), file)
        self._home = Homes(files, index)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def names(self) -> Collection[str]:
        return self._home.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._home[name].get_slice(name).get_shape())

    def stored(self, name: str) -> str:
        return str(self._home[name].get_slice(name).get_dtype())

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * known_dtype(name, self.stored(name)).itemsize

    def raw(self, name: str) -> memoryview:
        return bytes_of(self.part(name))

    def slices(self, name: str, rows: int) -> Iterator[Tensor]:
        self.dtype(name)
        stored = self._home[name].get_slice(name)
        for start in range(0, self.shape(name)[0], rows):
            yield stored[start : start + rows]

    def part(self, name: str) -> Tensor:
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
