"""Which of a checkpoint's files each tensor is read from: the one that the index names, and no other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

from headgram.errors import HeadgramError

T = TypeVar("T")


class Homes(Generic[T]):
    """What each tensor is read from.

    Parameters
    ----------
    files
        By file, the tensors that it holds, and what each is read from.
    index
        By tensor, the file that holds it, where the checkpoint has an index. What else a file holds is ignored.

    Raises
    ------
    HeadgramError
        If there is no index, and two files hold a tensor of one name.
    """

    def __init__(self, files: Mapping[str, Mapping[str, T]], index: Mapping[str, str] | None = None) -> None:
        self._homes: dict[str, T] = {}
        self._lacking: dict[str, str] = {}
        if index is not None:
            for name, file in index.items():
                if name in files[file]:
                    self._homes[name] = files[file][name]
                else:
                    self._lacking[name] = file
            return
        first: dict[str, str] = {}
        for file, tensors in files.items():
            for name, place in tensors.items():
                if name in first:
                    raise HeadgramError(
                        f"tensor {name!r:.200} is in {first[name]} and in {file}, and no index says which is meant: "
                        "remove one of them"
                    )
                first[name] = file
                self._homes[name] = place

    def __contains__(self, name: str) -> bool:
        if name in self._lacking:
            raise HeadgramError(
                f"the index says that tensor {name!r:.200} is in {self._lacking[name]}, which lacks it: fetch both again"
            )
        return name in self._homes

    def __getitem__(self, name: str) -> T:
        return self._homes[name]

    def names(self) -> Collection[str]:
        """The tensors that have a home."""
        return self._homes.keys()
