"""An opened checkpoint: its stacks, and the weights of any layer's heads."""

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
from headgram.families.layouts import LAYOUTS, QK, ROLES, Dimensions, Part, check_shapes, reads_of, undo_gguf_permutation
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
    value_rank, output_width
        `r_v`, and the width that heads write to; they differ from `r` and `d` in few families.
    missing
        The roles that cannot be read, each with a sentence that says why.
    notes
        What a reader of a role must know.
    """

    name: str
    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    rank: int
    hidden: int
    value_rank: int
    output_width: int
    missing: Mapping[str, str]
    notes: Mapping[str, str]
    _tensors: dict[str, str] = field(repr=False, compare=False)
    _stored: Mapping[str, tuple[int, frozenset[str]]] = field(repr=False, compare=False)  # bytes and precisions
    _layout: str = field(repr=False, compare=False)
    _permuted: bool = field(repr=False, compare=False)
    _sizes: Mapping[str, int] = field(repr=False, compare=False)

    @property
    def roles(self) -> tuple[str, ...]:
        """What can be read: `query` and `key`, and most often `value` and `output`."""
        return tuple(role for role in ROLES if role not in self.missing)

    @property
    def dtype(self) -> str:
        """The stored precision of its queries and keys."""
        return self.stored_as(QK)

    @property
    def qk_bytes(self) -> int:
        """Bytes on disk of the tensors that hold its queries and keys."""
        return self.nbytes(QK)

    @property
    def dimensions(self) -> Dimensions:
        return Dimensions(self.heads, self.kv_heads, self.rank, self.hidden, self.value_rank, self.output_width, self._sizes)

    def nbytes(self, roles: Iterable[str]) -> int:
        """Bytes on disk of the tensors that hold these roles, each counted once.

        Raises
        ------
        HeadgramError
            As `Checkpoint.factors`.
        """
        return sum(self._stored[key][0] for key in self._keys(roles))

    def stored_as(self, roles: Iterable[str]) -> str:
        """The precision in which the tensors of these roles are stored, in the file format's own word; several are joined by `+`.

        Raises
        ------
        HeadgramError
            As `Checkpoint.factors`.
        """
        return "+".join(sorted(frozenset().union(*(self._stored[key][1] for key in self._keys(roles)))))

    def _keys(self, roles: Iterable[str]) -> set[str]:
        return {self._tensors[tensor] for tensor in self._reads(roles)}

    def _reads(self, roles: Iterable[str]) -> list[str]:
        """What the layout reads for these roles, in the order of the family's data."""
        roles = tuple(roles)
        for role in roles:
            if role not in ROLES:
                raise HeadgramError(f"unknown role '{role:.60}'; there are: {', '.join(ROLES)}")
            if role in self.missing:
                raise HeadgramError(f"the stack '{self.name}' has no role '{role}' to read: {self.missing[role]}")
        wanted = reads_of(self._layout, roles)
        return [tensor for tensor in self._tensors if tensor in wanted]


class Checkpoint:
    """The weights of attention heads, layer by layer; made by `open_checkpoint`. A context manager.

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
        """`W_Q (H, r, d)` and `W_K (K, r, d)` of one layer, as `factors` reads them."""
        factors = self.factors(stack_name, layer, QK)
        return factors["query"], factors["key"]

    def factors(
        self, stack_name: str, layer: int, roles: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "heads rank width"]]:
        """The weights of one layer's heads, by role, in stored precision; no tensor is read twice.

        At least float32 if the format is quantised, or if the weights are products of stored factors.

        Parameters
        ----------
        stack_name, layer
            The stack, and the layer's true index.
        roles
            Any of `query`, `key`, `value`, `output`; all that the stack has if not given.

        Returns
        -------
        dict
            `query (H, r, d)`, `key (K, r, d)`, `value (K, r_v, d)`, and `output (H, r_v, d)`: the columns of `W_O` that a head
            owns, transposed. Query head `h` reads the key and the value of head `h * K // H`.

        Raises
        ------
        HeadgramError
            If the stack has no such layer or role, or a weight is not finite.

        Examples
        --------
        >>> checkpoint = open_checkpoint("models/tiny-llama")  # doctest: +SKIP
        >>> checkpoint.factors("self", 0, ["value", "output"])["output"].shape  # doctest: +SKIP
        torch.Size([4, 8, 32])
        """
        stack = self.stack(stack_name)
        wanted = tuple(stack.roles if roles is None else roles)
        names = self._names(stack, layer, wanted)
        stored = {name: self._store.read(name) for name in dict.fromkeys(names.values())}
        for name, tensor in stored.items():
            if not is_finite(tensor):
                raise HeadgramError(
                    f"layer {layer}: tensor {name} holds a NaN or an infinity: the checkpoint is damaged or its training diverged"
                )
        tensors = {tensor: stored[name] for tensor, name in names.items()}
        if stack._permuted:
            counts = {"query": stack.heads, "key": stack.kv_heads}
            tensors |= {role: undo_gguf_permutation(tensors[role], count) for role, count in counts.items() if role in tensors}
        factors: dict[str, Tensor] = {}
        for part in LAYOUTS[stack._layout]:
            if set(part.gives) & set(wanted):
                factors |= part.split(stack.dimensions, **{tensor: tensors[tensor] for tensor in part.reads})
        return {role: factors[role] for role in wanted}

    def prefetch(self, stack_name: str, layers: Iterable[int], roles: Iterable[str] = QK) -> None:
        """Fetch the weights of some layers together, where that is quicker than one by one; they stay in memory until read."""
        stack, roles = self.stack(stack_name), tuple(roles)
        self._store.prefetch([name for layer in layers for name in self._unique(stack, layer, roles)])

    def digest(self, stack_name: str, layer: int, roles: Iterable[str] = QK) -> str:
        """What one layer's tensors of some roles are pinned by in the lock.

        BLAKE2b of their stored bytes, as 32 hexadecimal digits. At the hub, where reading them all just to lock would be a
        waste, a digest of the files' own hashes and the tensors' places, which begins with `hub:`.

        Raises
        ------
        HeadgramError
            As `factors`.
        """
        names = self._unique(self.stack(stack_name), layer, roles)
        return self._store.pin(names) or self._content_digest(names)

    def holds(self, stack_name: str, layer: int, digest: str, roles: Iterable[str] = QK) -> bool:
        """Whether a layer is what was pinned by this digest.

        What was pinned at the hub and is read from the local cache now rests on the commit, which both were asked for by.
        """
        names = self._unique(self.stack(stack_name), layer, roles)
        if digest.startswith(HUB_DIGEST):
            return self._store.pin(names) in (digest, None)
        return self._content_digest(names) == digest

    def _content_digest(self, names: Iterable[str]) -> str:
        state = hashlib.blake2b(digest_size=16)
        for name in names:
            state.update(self._store.raw(name))
        return state.hexdigest()

    def _names(self, stack: Stack, layer: int, roles: Iterable[str]) -> dict[str, str]:
        if layer not in stack.layers:
            raise HeadgramError(f"the stack '{stack.name}' has no layer {layer}; it has {', '.join(map(str, stack.layers))}")
        return {tensor: stack._tensors[tensor].format(layer=layer) for tensor in stack._reads(roles)}

    def _unique(self, stack: Stack, layer: int, roles: Iterable[str]) -> list[str]:
        """The names of a layer's tensors; one may serve as key and value at once."""
        return list(dict.fromkeys(self._names(stack, layer, roles).values()))

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
        _stack(store, rule, *find_layers(store, rule, prefix, config, architecture, given), architecture)
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
        block="blk.{layer}.",
        modules=family.gguf.modules,
        layers="block_count",
        heads="attention.head_count",
        kv_heads="attention.head_count_kv",
        hidden="embedding_length",
        head_dim="attention.key_length",
        remarks=family.stacks[0].remarks,
    )
    found = find_layers(store, rule, "", meta, architecture, given)
    stack = _stack(store, rule, *found, architecture, permuted=family.gguf.permuted)
    return given.get("model_type") or architecture, family, (stack,)


def _stack(
    store: TensorStore,
    rule: StackRule,
    tensors: dict[str, str],
    layers: tuple[int, ...],
    dims: Dimensions,
    architecture: str,
    permuted: bool = False,
) -> Stack:
    if dims.heads % dims.kv_heads:
        raise HeadgramError(f"{dims.heads} query heads cannot share {dims.kv_heads} key heads evenly")
    remarks = [remark for remark in rule.remarks if architecture in remark.types or not remark.types]
    missing = {role: remark.text for remark in remarks if remark.unproven for role in remark.roles}
    for part in LAYOUTS[rule.layout]:
        problem = _problem(store, part, tensors, layers, dims)
        if problem and set(part.gives) & set(QK):
            raise HeadgramError(problem)
        missing |= {role: problem for role in part.gives if problem and role not in missing}
    readable = reads_of(rule.layout, tuple(role for role in ROLES if role not in missing))
    return Stack(
        name=rule.name,
        layers=layers,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        rank=dims.rank,
        hidden=dims.hidden,
        value_rank=dims.value_rank,
        output_width=dims.output_width,
        missing={role: missing[role] for role in ROLES if role in missing},
        notes={role: remark.text for remark in remarks if not remark.unproven for role in remark.roles},
        _tensors=tensors,
        _stored={tensors[tensor]: _stored(store, [tensors[tensor].format(layer=n) for n in layers]) for tensor in readable},
        _layout=rule.layout,
        _permuted=permuted,
        _sizes=dims.sizes,
    )


def _stored(store: TensorStore, names: Iterable[str]) -> tuple[int, frozenset[str]]:
    """The bytes of some tensors, and their precisions."""
    names = list(names)
    return sum(store.nbytes(name) for name in names), frozenset(store.dtype(name) for name in names)


def _problem(store: TensorStore, part: Part, tensors: Mapping[str, str], layers: tuple[int, ...], dims: Dimensions) -> str | None:
    """Why a part of a layout cannot be read from a checkpoint, or None."""
    if unnamed := [tensor for tensor in part.reads if tensor not in tensors]:
        return f"the family's data names no tensor for its {unnamed[0]}"
    for layer in layers:
        names = {tensor: tensors[tensor].format(layer=layer) for tensor in part.reads}
        if lacking := [name for name in names.values() if name not in store]:
            return f"layer {layer}: the checkpoint lacks tensor {lacking[0]}"
        try:
            check_shapes(part, dims, {tensor: store.shape(name) for tensor, name in names.items()}, names)
            for name in names.values():
                store.dtype(name)  # refuses what cannot be read
        except HeadgramError as error:
            return f"layer {layer}: {error}"
    return None
