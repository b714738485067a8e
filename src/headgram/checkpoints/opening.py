"""From a manifest's source to its tensors: here or at the hub, in whichever format, quantised or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgram.checkpoints.adapters import merged, with_adapters_merged
from headgram.checkpoints.bases import AdaptedLocation, AnyLocation, with_base
from headgram.checkpoints.bin_store import BinStore
from headgram.checkpoints.distcp_store import DistcpStore
from headgram.checkpoints.gguf_store import GgufStore
from headgram.checkpoints.original_llama import SlicedStore, in_transformers_names
from headgram.checkpoints.quantised import with_plain_weights
from headgram.checkpoints.safetensors_store import SafetensorsStore
from headgram.checkpoints.sources import Location, is_hub_id, locate_here
from headgram.checkpoints.stores import TensorStore
from headgram.checkpoints.weight_files import ADAPTER_CONFIG, MODELOPT_CONFIG
from headgram.checkpoints.wrappers import without_wrappers
from headgram.errors import HeadgramError

if TYPE_CHECKING:
    from headgram.checkpoints.hub import RemoteLocation

#: Bytes of a pointer of Git LFS, by its specification.
_LARGEST_POINTER = 1024


def locate(source: str, revision: str | None = None, base: str | None = None) -> AnyLocation:
    """Find a source on this machine or, if it is a hub id that the local cache does not hold whole, at the hub.

    Parameters
    ----------
    source, revision
        The source, and the revision of a hub id.
    base
        Of an adapter, the checkpoint that it changes; what its settings name if not given.

    Raises
    ------
    HeadgramError
        If there is nothing there, or nothing that headgram reads.
    """
    return with_base(_locate(source, revision), base, _locate)


def _locate(source: str, revision: str | None) -> Location | RemoteLocation:
    try:
        return locate_here(source, revision)
    except HeadgramError:
        if not is_hub_id(source):
            raise
        from headgram.checkpoints.hub import locate_at_hub  # imports an HTTP client, which most runs never need

        return locate_at_hub(source, revision)


def open_store(location: AnyLocation) -> TensorStore:
    """The store of a located source, by its format and whether it is here or at the hub.

    Quantised weights are read as weights, and adapters are merged into the weights that they change.

    Raises
    ------
    HeadgramError
        If a file is not what its format asks for, the weights are quantised in an unknown way, or an adapter is no LoRA.
    """
    if isinstance(location, AdaptedLocation):
        settings = location.adapter.config(ADAPTER_CONFIG) or {}
        return merged(open_store(location.underneath), _plain_store(location.adapter), settings, location.adapter.where)
    store = _plain_store(location)
    if isinstance(store, GgufStore):
        return store
    config = location.config()
    modelopt = (location.config(MODELOPT_CONFIG) or {}).get("quantization")
    if isinstance(modelopt, dict):
        _check_agreement(location.where, (config or {}).get("quantization_config"), modelopt)
        config = {"quantization_config": {"quant_method": "modelopt", **modelopt}, **(config or {})}
    weights = with_plain_weights(in_transformers_names(store, config, location.where), config)
    return with_adapters_merged(weights, location.config(ADAPTER_CONFIG), location.where)


def _check_agreement(where: str, stated: Any, modelopt: Mapping[str, Any]) -> None:
    """Refuse two files that say differently how the weights are quantised."""
    for key, default in (("quant_method", "modelopt"), ("quant_algo", None)) if isinstance(stated, Mapping) else ():
        other = modelopt.get(key, default)
        if key in stated and other is not None and not str(stated[key]).startswith(str(other)):
            raise HeadgramError(
                f"config.json of {where} states {key} = {stated[key]!r:.60}, and {MODELOPT_CONFIG} {other!r:.60}: remove the one "
                "that is wrong"
            )


def _check_fetched(path: Path) -> None:
    """Refuse what Git leaves in the place of a large file that it did not fetch."""
    if path.stat().st_size < _LARGEST_POINTER and path.read_bytes().startswith(b"version https://git-lfs"):
        raise HeadgramError(f"{path} is a pointer of Git LFS, and not the file that it stands for: fetch that by `git lfs pull`")


def _plain_store(location: Location | RemoteLocation) -> TensorStore:
    """The tensors as they are stored."""
    if not isinstance(location, Location):
        from headgram.checkpoints.remote import RemoteSafetensorsStore

        return without_wrappers(RemoteSafetensorsStore(location))
    paths = {name: location.path(name) for name in location.weights}
    for path in paths.values():
        _check_fetched(path)
    if location.format == "gguf":
        return GgufStore(paths)
    if location.format == "distcp":
        return without_wrappers(DistcpStore(paths))
    if location.choice.sliced:
        return SlicedStore([BinStore({name: path}) for name, path in paths.items()])
    store = SafetensorsStore if location.format == "safetensors" else BinStore
    return without_wrappers(store(paths, location.choice.index))
