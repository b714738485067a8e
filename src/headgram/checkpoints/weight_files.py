"""Which of a checkpoint's files are its weights, and which say how they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from headgram.errors import HeadgramError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
#: By suffix, what a weight file is.
FORMATS = {".safetensors": "safetensors", ".gguf": "gguf", **dict.fromkeys(_TORCH, "bin"), ".distcp": "distcp"}
#: What transformers calls the weights, in the order of preference: `NAME`, or shards that `NAME.index.json` lists.
_USUAL_NAMES = ("model.safetensors", "pytorch_model.bin")
#: What transformers calls a configuration, and what Meta and Mistral call theirs.
CONFIG = "config.json"
PARAMS = "params.json"
_ORIGINAL = re.compile(r"consolidated\.(\d\d)\.pth")
_PARAMS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "vocab_size": "vocab_size",
}  # fmt: skip
#: What litgpt calls its weights, and their configuration.
_LITGPT = "lit_model.pth"
LITGPT_CONFIG = "model_config.yaml"
#: What modelopt says of a quantised checkpoint where `config.json` is silent.
MODELOPT_CONFIG = "hf_quant_config.json"
#: What peft calls an adapter's settings, and its weights.
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
#: The table of a distributed checkpoint of torch, beside its files.
DISTRIBUTED_TABLE = ".metadata"
#: What training leaves beside the weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.\w+")
_MOST_SHARDS = 10_000


@dataclass(frozen=True)
class WeightFiles:
    """Which of a checkpoint's files are its weights.

    Attributes
    ----------
    files
        Their names, in order; one format.
    index
        By tensor, the file that it is read from; None where there is no index.
    passed_over
        Other weight files beside them, and other configurations, which are not read.
    sliced
        Whether each file holds a slice of every weight.
    adapter
        Whether they only change the weights of another checkpoint.
    """

    files: tuple[str, ...]
    index: Mapping[str, str] | None = None
    passed_over: tuple[str, ...] = ()
    sliced: bool = False
    adapter: bool = False


def choose_weights(names: Collection[str], read_index: Callable[[str], dict[str, Any]], where: str) -> WeightFiles:
    """The weight files among a checkpoint's files: safetensors or torch's own, with an index or alone, or GGUF.

    Parameters
    ----------
    names
        The files that are there.
    read_index
        Reads a JSON file among them.
    where
        The checkpoint in words, for messages.

    Raises
    ------
    HeadgramError
        If there are none, several to choose from, or a useless index.
    """
    safetensors, pickle = _USUAL_NAMES
    found = (
        _adapter(names, read_index, where)
        or _usual(names, safetensors, read_index, where)
        or _only(names, (".safetensors",), where)
        or _only(names, (".gguf",), where)
        or _usual(names, pickle, read_index, where)
        or _distributed(names)
        or _original(names)
        or _only(names, _TORCH, where)
    )
    if found:
        described = () if format_of(found.files[0]) == "gguf" else described_by(found, names)
        others = {name for name in names if "/" not in name and PurePosixPath(name).suffix in FORMATS} - set(found.files)
        others |= ({CONFIG, PARAMS, LITGPT_CONFIG} & set(names)) - set(described)
        return replace(found, passed_over=tuple(sorted(others)))
    raise HeadgramError(
        f"{where} holds no .safetensors, .gguf or torch file ({', '.join(_TORCH)}), and no distributed checkpoint"
    )


def weights_of_file(name: str, names: Collection[str], source: str) -> WeightFiles:
    """The weights that one file names: itself, with what belongs to it among the files beside it.

    Raises
    ------
    HeadgramError
        If it is no weight file, or a part that means nothing alone.
    """
    if PurePosixPath(name).suffix not in FORMATS:
        raise HeadgramError(f"'{source}' is neither a folder nor a .safetensors, .gguf or torch file ({', '.join(_TORCH)})")
    original = _original(names)
    if PurePosixPath(name).suffix == ".distcp" or (original and original.sliced and name in original.files):
        raise HeadgramError(f"'{source}' is a part of a checkpoint, and means nothing alone: name the folder that it is in")
    return WeightFiles(parts_of(name), adapter=name in _ADAPTERS and ADAPTER_CONFIG in names)


def _usual(names: Collection[str], whole: str, read_index: Callable[[str], dict[str, Any]], where: str) -> WeightFiles | None:
    if f"{whole}.index.json" in names:
        return _shards(read_index(f"{whole}.index.json"), whole, where)
    return WeightFiles((whole,)) if whole in names else None


def _adapter(names: Collection[str], read_index: Callable[[str], dict[str, Any]], where: str) -> WeightFiles | None:
    choices = (_usual(names, whole, read_index, where) for whole in _ADAPTERS if ADAPTER_CONFIG in names)
    found = next((choice for choice in choices if choice), None)
    return replace(found, adapter=True) if found else None


def _only(names: Collection[str], suffixes: tuple[str, ...], where: str) -> WeightFiles | None:
    """The one model among the files with some suffixes; a model in parts is one."""
    found = sorted(name for name in names if name.endswith(suffixes) and "/" not in name and not _NO_WEIGHTS.fullmatch(name))
    if len({_PART.sub(r"\1\4", name) for name in found}) > 1:
        raise HeadgramError(f"{where} holds several {' and '.join(f'*{s}' for s in suffixes)} files: name the one that is meant")
    return WeightFiles(parts_of(found[0])) if found else None


def _original(names: Collection[str]) -> WeightFiles | None:
    """The slices of a llama as it was published: `consolidated.00.pth` and so on, all of them."""
    found = [part for name in names if (part := _ORIGINAL.fullmatch(name))]
    last = max((int(part[1]) for part in found), default=-1)
    return WeightFiles(tuple(f"consolidated.{i:02}.pth" for i in range(last + 1)), sliced=last > 0) if found else None


def _distributed(names: Collection[str]) -> WeightFiles | None:
    """The files of a distributed checkpoint, and its table."""
    files = sorted(name for name in names if name.endswith(".distcp") and "/" not in name)
    return WeightFiles((*files, DISTRIBUTED_TABLE)) if files and DISTRIBUTED_TABLE in names else None


def _shards(index: dict[str, Any], whole: str, where: str) -> WeightFiles:
    """The files that an index names. They may only be weight files of the same format."""
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise HeadgramError(f"{where}: {whole}.index.json has no 'weight_map' of tensors and files: fetch it again")
    files = tuple(sorted(set(named.values())))
    if len(files) > _MOST_SHARDS:
        raise HeadgramError(f"{where}: {whole}.index.json names {len(files)} files, which no real checkpoint's does")
    for name in files:
        if leads_out(PurePosixPath(name)):
            raise HeadgramError(f"the file name {name!r:.200} leads out of {where}: a checkpoint may only name its own files")
        if not name.endswith(PurePosixPath(whole).suffix) or not name.isprintable():
            raise HeadgramError(
                f"{where}: {whole}.index.json names {name!r:.200}, which is no {PurePosixPath(whole).suffix} file"
            )
    return WeightFiles(files, named)


def parts_of(name: str) -> tuple[str, ...]:
    """A file, or all the parts of the model that it is one of."""
    part = _PART.fullmatch(name)
    if part and int(part[3]):
        return tuple(f"{part[1]}-{i + 1:05d}-of-{part[3]}{part[4]}" for i in range(min(int(part[3]), _MOST_SHARDS)))
    return (name,)


def format_of(name: str) -> str:
    """The format of a weight file, by its name."""
    return FORMATS[PurePosixPath(name).suffix]


def described_by(choice: WeightFiles, names: Collection[str]) -> tuple[str, ...]:
    """Which of a checkpoint's files, beside the weights, say how they are read."""
    first = [name for name in ((LITGPT_CONFIG,) if is_litgpt(choice, names) else (CONFIG, PARAMS)) if name in names][:1]
    return (*first, *(name for name in (MODELOPT_CONFIG, ADAPTER_CONFIG) if name in names))


def is_litgpt(choice: WeightFiles, names: Collection[str]) -> bool:
    """Whether the weights are litgpt's, which may lie beside the `config.json` of the model that they were converted from."""
    return choice.files == (_LITGPT,) and LITGPT_CONFIG in names


def config_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `params.json` in the words of `config.json`."""
    return {"model_type": "llama", **{new: params[old] for old, new in _PARAMS.items() if params.get(old) is not None}}


def leads_out(relative: PurePosixPath) -> bool:
    """Whether a path leaves the folder that it is relative to."""
    return relative.is_absolute() or ".." in relative.parts
