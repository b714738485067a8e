"""Torch's own weight files: zip archives with a pickle, of which nothing but tensors is unpickled."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from headgram.checkpoints.sources import LARGEST_JSON
from headgram.checkpoints.stores import DTYPES, TensorStore, bytes_of, float_dtype
from headgram.errors import HeadgramError

#: As which torch and zipfile report a file that they cannot read.
_DAMAGE = (
    zipfile.BadZipFile, struct.error, RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError,
    AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


class BinStore(TensorStore):
    """One or several `.bin` files, mapped into memory."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path in paths:
            self._tensors.update(_load(path))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        stored = self._tensors[name].dtype
        return float_dtype(name, _WORDS.get(stored, str(stored)))

    def nbytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def raw(self, name: str) -> memoryview:
        return bytes_of(self._tensors[name])

    def read(self, name: str) -> Tensor:
        self.dtype(name)
        return self.part(name)

    def part(self, name: str) -> Tensor:
        return self._tensors[name].clone(memory_format=torch.contiguous_format)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._tensors.clear()


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. `weights_only` lets the pickle build tensors and containers, and call nothing else."""
    convert = "convert it to safetensors where you trust it"
    _check_archive(path, convert)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise HeadgramError(f"{path} is a pickle that holds more than tensors, which headgram does not run: {convert}") from None
    except _DAMAGE as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise HeadgramError(f"{path} is not a whole torch file ({reason}): fetch it again") from None
    if not isinstance(content, Mapping):
        raise HeadgramError(f"{path} holds no table of tensors, but a {type(content).__name__}")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise HeadgramError(f"{path}: tensor {name} of shape {tuple(tensor.shape)} is larger than what is stored of it")
    return tensors


def _check_archive(path: Path, convert: str) -> None:
    """Refuse what could grow beyond the file's own size.

    Only torch's zip format can be mapped, and it stores its records uncompressed; and of the few calls that `weights_only`
    allows, `bytearray` makes buffers of any size, which no table of tensors needs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            stored = sum(record.file_size for record in records)
            if any(record.compress_type != zipfile.ZIP_STORED for record in records) or stored > path.stat().st_size:
                raise HeadgramError(f"{path} holds compressed records, which torch never writes: {convert}")
            tables = [record for record in records if record.filename.endswith("data.pkl")]
            if any(record.file_size > LARGEST_JSON or b"bytearray" in archive.read(record) for record in tables):
                raise HeadgramError(f"{path} is a pickle that holds more than tensors, which headgram does not run: {convert}")
    except _DAMAGE:
        raise HeadgramError(f"{path} is not a whole torch file, or older than torch 1.6: fetch it again, or {convert}") from None
