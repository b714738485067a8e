"""From a manifest's source to its tensors: here or at the hub, in whichever format, quantised or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headgram.checkpoints.bin_store import BinStore
from headgram.checkpoints.gguf_store import GgufStore
from headgram.checkpoints.quantised import with_plain_weights
from headgram.checkpoints.safetensors_store import SafetensorsStore
from headgram.checkpoints.sources import Location, is_hub_id, locate_here
from headgram.checkpoints.stores import TensorStore
from headgram.errors import HeadgramError

if TYPE_CHECKING:
    from headgram.checkpoints.hub import RemoteLocation


def locate(source: str, revision: str | None = None) -> Location | RemoteLocation:
    """Find a source on this machine or, if it is a hub id that the local cache does not hold whole, at the hub.

    Raises
    ------
    HeadgramError
        If there is nothing there, or nothing that headgram reads.
    """
    try:
        return locate_here(source, revision)
    except HeadgramError:
        if not is_hub_id(source):
            raise
        from headgram.checkpoints.hub import locate_at_hub  # imports an HTTP client, which most runs never need

        return locate_at_hub(source, revision)


def open_store(location: Location | RemoteLocation) -> TensorStore:
    """The store of a located source, by its format and whether it is here or at the hub; quantised weights are read as weights.

    Raises
    ------
    HeadgramError
        If a file is not what its format asks for, or the weights are quantised in an unknown way.
    """
    if not isinstance(location, Location):
        from headgram.checkpoints.remote import RemoteSafetensorsStore

        return with_plain_weights(RemoteSafetensorsStore(location), location.config())
    paths = {name: location.path(name) for name in location.weights}
    if location.format == "gguf":
        return GgufStore(paths)
    store = SafetensorsStore if location.format == "safetensors" else BinStore
    return with_plain_weights(store(paths, location.choice.index), location.config())
