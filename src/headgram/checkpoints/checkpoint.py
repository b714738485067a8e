"""An opened checkpoint: its stacks, and the query and key weights of any layer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from jaxtyping import Float
from torch import Tensor

from headgram.checkpoints.dimensions import find_layers, find_rules
from headgram.checkpoints.gguf_store import GgufStore
from headgram.checkpoints.opening import locate, open_store
from headgram.checkpoints.sources import HUB_DIGEST, Location
from headgram.checkpoints.stores import TensorStore
from headgram.errors import HeadgramError
from headgram.families.layouts import LAYOUTS, Dimensions, check_shapes, undo_gguf_permutation
from headgram.families.registry import Family, StackRule, family_of, family_of_gguf
from headgram.geometry.checks import is_finite

if TYPE_CHECKING:
    from headgram.checkpoints.hub import RemoteLocation

#: What a manifest may state when a checkpoint does not, or states it wrongly.
OVERRIDES = ("model_type", "heads", "kv_heads", "head_dim")

_LONGEST_NAME = 100


@dataclass(frozen=True)
class Stack:
    """A run of attention layers with equal head counts that read one residual stream.

    Attributes
    ----------
    name
        `self` for decoders and encoders; `encoder`, `decoder`, `cross` for encoder–decoders; `text`, `vision` for two towers.
    layers
        The true indices of its layers in the model.
    heads, kv_heads, rank, hidden
        `H`, `K`, `r` and `d`.
    dtype
        The stored precision, in the file format's own word.
    qk_bytes
        Bytes on disk of the tensors that hold its queries and keys.
    """

    name: str
    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    rank: int
    hidden: int
    dtype: str
    qk_bytes: int
    _tensors: dict[str, str] = field(repr=False, compare=False)
    _layout: str = field(repr=False, compare=False)
    _permuted: bool = field(repr=False, compare=False)
    _sizes: Mapping[str, int] = field(repr=False, compare=False)

    @property
    def dimensions(self) -> Dimensions:
        return Dimensions(self.heads, self.kv_heads, self.rank, self.hidden, self._sizes)


class Checkpoint:
    """Query and key weights, layer by layer; made by `open_checkpoint`. A context manager.

    Attributes
    ----------
    architecture
        The `model_type` (or GGUF architecture) that the checkpoint declares, or the manifest overrides.
    stacks
        A tuple of `Stack`.
    location
        Where the files are.
    """

    def __init__(
        self, location: Location | RemoteLocation, store: TensorStore, architecture: str, stacks: tuple[Stack, ...]
    ) -> None:
        self.location = location
        self.architecture = architecture
        self.stacks = stacks
        self._store = store

    def stack(self, name: str) -> Stack:
        """The stack of this name.

        Raises
        ------
        HeadgramError
            If there is none.
        """
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise HeadgramError(f"there is no stack '{name}'; there are: {', '.join(stack.name for stack in self.stacks)}")

    def qk(self, stack_name: str, layer: int) -> tuple[Float[Tensor, "heads rank hidden"], Float[Tensor, "kv_heads rank hidden"]]:
        """`W_Q (H, r, d)` and `W_K (K, r, d)` of one layer, in stored precision.

        At least float32 if the format is quantised, or if the weights are products of stored factors.

        Parameters
        ----------
        stack_name, layer
            The stack, and the layer's true index.

        Raises
        ------
        HeadgramError
            If the stack has no such layer, or a weight is not finite.
        """
        stack = self.stack(stack_name)
        names = self._names(stack, layer)
        tensors = {role: self._store.read(name) for role, name in names.items()}
        for role, name in names.items():
            if not is_finite(tensors[role]):
                raise HeadgramError(
                    f"layer {layer}: tensor {name} holds a NaN or an infinity: the checkpoint is damaged or its training diverged"
                )
        if stack._permuted:
            counts = {"query": stack.heads, "key": stack.kv_heads}
            tensors = {role: undo_gguf_permutation(tensor, counts[role]) for role, tensor in tensors.items()}
        return LAYOUTS[stack._layout].split(stack.dimensions, **tensors)

    def prefetch(self, stack_name: str, layers: Iterable[int]) -> None:
        """Fetch the weights of some layers together, where that is quicker than one by one; they stay in memory until read."""
        stack = self.stack(stack_name)
        self._store.prefetch([name for layer in layers for name in self._names(stack, layer).values()])

    def digest(self, stack_name: str, layer: int) -> str:
        """What one layer's query and key tensors are pinned by in the lock.

        BLAKE2b of their stored bytes, as 32 hexadecimal digits. At the hub, where reading them all just to lock would be a
        waste, a digest of the files' own hashes and the tensors' places, which begins with `hub:`.
        """
        names = self._names(self.stack(stack_name), layer).values()
        return self._store.pin(names) or self._content_digest(names)

    def holds(self, stack_name: str, layer: int, digest: str) -> bool:
        """Whether a layer is what was pinned by this digest.

        What was pinned at the hub and is read from the local cache now rests on the commit, which both were asked for by.
        """
        names = self._names(self.stack(stack_name), layer).values()
        if digest.startswith(HUB_DIGEST):
            return self._store.pin(names) in (digest, None)
        return self._content_digest(names) == digest

    def _content_digest(self, names: Iterable[str]) -> str:
        state = hashlib.blake2b(digest_size=16)
        for name in names:
            state.update(self._store.raw(name))
        return state.hexdigest()

    def _names(self, stack: Stack, layer: int) -> dict[str, str]:
        if layer not in stack.layers:
            raise HeadgramError(f"the stack '{stack.name}' has no layer {layer}; it has {', '.join(map(str, stack.layers))}")
        return {role: key.format(layer=layer) for role, key in stack._tensors.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._store.__exit__(*exc)


def open_checkpoint(
    source: str | os.PathLike[str], revision: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Parameters
    ----------
    source
        A hub id, a folder, a `.safetensors`, `.gguf` or `.bin` file, or `package:NAME/PATH`. A hub id that the local
        Hugging Face cache does not hold is read at the hub, by ranges.
    revision
        Branch, tag or commit of a hub id.
    overrides
        Any of `model_type`, `heads`, `kv_heads`, `head_dim`, for a checkpoint that does not state them.

    Raises
    ------
    HeadgramError
        If the source cannot be found or read, its architecture is unknown, or its tensors disagree with its configuration.
    """
    location = locate(os.fspath(source), revision)
    store = open_store(location)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if unknown := set(given) - set(OVERRIDES):
        raise HeadgramError(f"unknown override '{sorted(unknown)[0]}'; there are: {', '.join(OVERRIDES)}")
    for key, value in given.items():
        if key != "model_type" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise HeadgramError(f"the override {key} is {value!r:.60}, which should be a positive whole number")
    if isinstance(store, GgufStore):
        architecture, family, stacks = _read_gguf(store, given)
    else:
        architecture, family, stacks = _read_config(location, store, given)
    if not stacks:
        raise HeadgramError(f"a checkpoint of the family '{family.name}' should hold attention weights, but this one has none")
    return Checkpoint(location, store, architecture, stacks)


def _read_config(
    location: Location | RemoteLocation, store: TensorStore, given: dict[str, Any]
) -> tuple[str, Family, tuple[Stack, ...]]:
    config = location.config()
    if config is None and "model_type" not in given:
        raise HeadgramError(f"{location.where} has no config.json: add it, or set `model_type` and `heads` in the manifest")
    config = config or {}
    architecture = given.get("model_type") or config.get("model_type")
    if not isinstance(architecture, str) or len(architecture) > _LONGEST_NAME:
        raise HeadgramError(f"the config.json of {location.where} names no model_type: set `model_type` in the manifest")
    family = family_of(architecture)
    if not family.stacks:
        architecture = _text_type(config, architecture)
        family = family_of(architecture)
    rules = find_rules(store, family, config, architecture)
    stacks = [
        _stack(store, rule.name, rule.layout, *find_layers(store, rule, prefix, config, architecture, given))
        for rule, prefix in rules
    ]
    return architecture, family, tuple(stacks)


def _text_type(config: Mapping[str, Any], architecture: str) -> str:
    """The type of a multimodal model's text tower."""
    tower = config.get("text_config")
    name = tower.get("model_type") if isinstance(tower, Mapping) else None
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        raise HeadgramError(
            f"the config.json of this '{architecture}' checkpoint names no text tower's type: set `model_type` in the manifest"
        )
    return name


def _read_gguf(store: GgufStore, given: dict[str, Any]) -> tuple[str, Family, tuple[Stack, ...]]:
    architecture = str(store.metadata.get("general.architecture"))[:_LONGEST_NAME]
    family = family_of(given["model_type"]) if "model_type" in given else family_of_gguf(architecture)
    if family.gguf is None:
        raise HeadgramError(f"the family '{family.name}' has no known GGUF naming")
    meta = {key.removeprefix(f"{architecture}."): value for key, value in store.metadata.items()}
    rule = StackRule(
        name=family.stacks[0].name,
        layout=family.gguf.layout,
        tensors=family.gguf.tensors,
        layers="block_count",
        heads="attention.head_count",
        kv_heads="attention.head_count_kv",
        hidden="embedding_length",
        head_dim="attention.key_length",
    )
    found = find_layers(store, rule, "", meta, architecture, given)
    stack = _stack(store, rule.name, rule.layout, *found, permuted=family.gguf.permuted)
    return given.get("model_type") or architecture, family, (stack,)


def _stack(
    store: TensorStore,
    name: str,
    layout: str,
    tensors: dict[str, str],
    layers: tuple[int, ...],
    dims: Dimensions,
    permuted: bool = False,
) -> Stack:
    if dims.heads % dims.kv_heads:
        raise HeadgramError(f"{dims.heads} query heads cannot share {dims.kv_heads} key heads evenly")
    stored = set()
    qk_bytes = 0
    for layer in layers:
        names = {role: key.format(layer=layer) for role, key in tensors.items()}
        try:
            check_shapes(layout, dims, {role: store.shape(key) for role, key in names.items()}, names)
        except HeadgramError as error:
            raise HeadgramError(f"layer {layer}: {error}") from None
        stored |= {store.dtype(key) for key in names.values()}
        qk_bytes += sum(store.nbytes(key) for key in names.values())
    return Stack(
        name=name,
        layers=layers,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        rank=dims.rank,
        hidden=dims.hidden,
        dtype="+".join(sorted(stored)),
        qk_bytes=qk_bytes,
        _tensors=tensors,
        _layout=layout,
        _permuted=permuted,
        _sizes=dims.sizes,
    )
