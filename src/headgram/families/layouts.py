"""How the weights of one attention layer lie in the tensors of a checkpoint.

Four roles: `query (H, r, d)` and `key (K, r, d)`; `value (K, r_v, d)`, what a head reads from the tokens that it attends to; and
`output (H, r_v, d)`, what it writes: the columns of `W_O` that a head owns, transposed. A layout is made of parts. Each takes
some named tensors, as stored, and gives the factors of one or more roles, so that what nobody asks for is not read. Of a tensor
that holds several roles, a part says which of its rows or columns each role needs. Every part says which shapes its tensors must
have for the head counts: a shape that merely happens to divide is not enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from headgram.errors import HeadgramError

if TYPE_CHECKING:
    from torch import Tensor

#: A tensor or an array.
Numbers = TypeVar("Numbers", bound=Any)

#: What a tensor of a layer may be to its heads.
ROLES = ("query", "key", "value", "output")
#: What the form `g = W_K^T W_Q` is made of; every stack has these two.
QK = ("query", "key")


@dataclass(frozen=True)
class Dimensions:
    """`H` query heads and `K` key heads of rank `r`, reading a residual stream of width `d`.

    `value_rank` is the rank of values, `output_width` the width that heads write to. `sizes` holds what a layout needs besides,
    such as the widths of latent attention's factors.
    """

    heads: int
    kv_heads: int
    rank: int
    hidden: int
    value_rank: int
    output_width: int
    sizes: Mapping[str, int] = field(default_factory=dict)


Shapes = dict[str, tuple[int, ...]]
#: Role -> `(heads, rank, width)`.
Factors = dict[str, "Tensor"]
#: The rows of a tensor from first to last: the roles that need the next rows, separated by blanks, and how many rows these are.
Rows = list[tuple[str, int]]


@dataclass(frozen=True)
class Cut:
    """Some rows of a tensor, or some columns.

    Attributes
    ----------
    axis
        0 for rows, 1 for columns.
    ranges
        First and last, that one excluded; ascending.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """How many rows or columns."""
        return sum(stop - start for start, stop in self.ranges)

    def of(self, numbers: Numbers) -> Numbers:
        """A copy of these rows or columns of a tensor, or of an array."""
        found: Numbers = numbers[(slice(None),) * self.axis + ([i for bounds in self.ranges for i in range(*bounds)],)]
        return found


@dataclass(frozen=True)
class Part:
    """Some tensors that are read together, the roles that they give, and how they are taken apart.

    `shapes` has the shape that every tensor must have; its keys are the arguments of `split` besides the dimensions. `sizes`
    names the entries of `Dimensions.sizes` that they read. If a tensor holds several roles, `rows` says in which order, of its
    rows or (`axis` 1) of its columns; then `split` also takes the roles whose rows it is given.
    """

    gives: tuple[str, ...]
    reads: tuple[str, ...]
    shapes: Callable[[Dimensions], Shapes]
    split: Callable[..., Factors]
    sizes: tuple[str, ...] = ()
    rows: Callable[[Dimensions], dict[str, Rows]] | None = None
    axis: int = 0

    def cuts(self, dims: Dimensions, roles: Collection[str]) -> dict[str, Cut]:
        """By tensor, the rows or columns that some roles need, where they do not need all of it."""
        found = {}
        for tensor, every in (self.rows(dims) if self.rows else {}).items():
            rows = [(of, count) for of, count in every if count]
            stops = list(itertools.accumulate(count for _, count in rows))
            needed = [bool(set(of.split()) & set(roles)) for of, _ in rows]
            if not all(needed):
                runs = itertools.groupby(zip(needed, [0, *stops], stops, strict=False), key=lambda run: run[0])
                kept = [list(run) for wanted, run in runs if wanted]
                found[tensor] = Cut(self.axis, tuple((run[0][1], run[-1][2]) for run in kept))
        return found

    def factors(self, dims: Dimensions, roles: Collection[str], tensors: Mapping[str, Tensor]) -> Factors:
        """The factors of some roles, out of what `cuts` leaves of the tensors."""
        given = {tensor: tensors[tensor] for tensor in self.reads}
        return self.split(dims, **given, roles=roles) if self.rows else self.split(dims, **given)


def _sizes(dims: Dimensions, role: str) -> tuple[int, int]:
    """How many heads queries, keys or values have, and the rank of each."""
    return dims.heads if role == "query" else dims.kv_heads, dims.value_rank if role == "value" else dims.rank


def _linear(role: str) -> Part:
    """Queries, keys or values in an `nn.Linear` weight, head after head: `(heads · rank, d)`."""

    def split(dims: Dimensions, **tensors: Tensor) -> Factors:
        return {role: tensors[role].view(*_sizes(dims, role), dims.hidden)}

    return Part((role,), (role,), lambda dims: {role: (math.prod(_sizes(dims, role)), dims.hidden)}, split)


def _transposed(role: str) -> Part:
    """As TransformerLens stores them: a matrix from the stream to each head, `(heads, d, rank)`."""

    def shapes(dims: Dimensions) -> Shapes:
        heads, rank = _sizes(dims, role)
        return {role: (heads, dims.hidden, rank)}

    return Part((role,), (role,), shapes, lambda dims, **tensors: {role: tensors[role].transpose(1, 2)})


def outputs(dims: Dimensions, output: Tensor) -> Factors:
    """An `nn.Linear` weight whose columns belong to head after head: `(d, H·r_v)`."""
    return output_rows(dims, output.t().contiguous())


def outputs_beside(dims: Dimensions, output: Tensor, roles: Collection[str] = ("output",)) -> Factors:
    """As `outputs`, before as many columns that read something else than heads, as ConvBERT's convolutions: `(d, 2·H·r_v)`."""
    return outputs(dims, output[:, : dims.heads * dims.value_rank]) if "output" in roles else {}


def output_rows(dims: Dimensions, output: Tensor) -> Factors:
    """As `outputs`, but stored `(in, out)`, as GPT-2's `Conv1D` does: `(H·r_v, d)`."""
    return {"output": output.view(dims.heads, dims.value_rank, dims.output_width)}


def _gated_order(dims: Dimensions) -> list[str]:
    """Every head is followed by a gate of the same size: `(H·2·r, d)`."""
    return ["query", "gate"] * dims.heads


def _fused_shapes(dims: Dimensions) -> Shapes:
    return {"fused": ((dims.heads + 2 * dims.kv_heads) * dims.rank, dims.hidden)}


def _key_value_rows(dims: Dimensions) -> dict[str, Rows]:
    """One weight with the blocks `[k; v]`, each head after head: `(K·r + K·r_v, d)`."""
    return {"key_value": [(role, math.prod(_sizes(dims, role))) for role in ("key", "value")]}


def key_value_blocks(dims: Dimensions, key_value: Tensor, roles: Collection[str] = ("key", "value")) -> Factors:
    """Both, out of the rows of those that are asked for."""
    factors: Factors = {}
    for role, rows in _key_value_rows(dims)["key_value"]:
        if role in roles:
            factors[role], key_value = key_value[:rows].view(*_sizes(dims, role), dims.hidden), key_value[rows:]
    return factors


def _block_order(dims: Dimensions) -> list[str]:
    """Blocks `[q; k; v]`, each head after head: `((H + 2K)·r, d)`."""
    return ["query"] * dims.heads + ["key"] * dims.kv_heads + ["value"] * dims.kv_heads


def _interleaved_order(dims: Dimensions) -> list[str]:
    """Key head after key head: its query heads, the key head, its value head, `(K·(H/K + 2)·r, d)`."""
    return (["query"] * (dims.heads // dims.kv_heads) + ["key", "value"]) * dims.kv_heads


def _quarter_shapes(dims: Dimensions) -> Shapes:
    if dims.heads % 4:
        raise HeadgramError(f"{dims.heads} heads do not divide into the 4 parts that this layout stores them in")
    return _fused_shapes(dims)


def _quarter_order(dims: Dimensions) -> list[str]:
    """CodeGen's four parts, each a quarter of all heads as `[q; v; k]`: `(4·3·(H/4)·r, d)`."""
    return [role for role in ("query", "value", "key") for _ in range(dims.heads // 4)] * 4


def _fused(tensor: str, shapes: Callable[[Dimensions], Shapes], order: Callable[[Dimensions], list[str]], axis: int = 0) -> Part:
    """One weight with the heads of several roles, in some order; stored `(in, out)` if `axis` is 1, as GPT-2's `Conv1D` does."""

    def split(dims: Dimensions, roles: Collection[str] | None = None, **tensors: Tensor) -> Factors:
        heads = (tensors[tensor].t().contiguous() if axis else tensors[tensor]).view(-1, dims.rank, dims.hidden)
        given = [role for role in order(dims) if roles is None or role in roles]
        return {each: heads[[i for i, role in enumerate(given) if role == each]] for each in ROLES if each in given}

    def rows(dims: Dimensions) -> dict[str, Rows]:
        return {tensor: [(role, dims.rank) for role in order(dims)]}

    gives = ("query",) if tensor == "query" else ("query", "key", "value")
    return Part(gives, (tensor,), shapes, split, rows=rows, axis=axis)


def _latent_query_shapes(dims: Dimensions) -> Shapes:
    latent = dims.sizes["query_latent"]
    return {"query_down": (latent, dims.hidden), "query_gain": (latent,), "query_up": (dims.heads * dims.rank, latent)}


def latent_queries(dims: Dimensions, query_down: Tensor, query_gain: Tensor, query_up: Tensor) -> Factors:
    """Multi-head latent attention: `W_Q` as the product of its factors, in float32 or better.

    A norm between the factors contributes its gain; its data-dependent scale, one number per token, is left out.
    """
    product = _exact(query_up) @ (_exact(query_gain)[:, None] * _exact(query_down))
    return {"query": product.view(dims.heads, dims.rank, dims.hidden)}


def _latent_shapes(dims: Dimensions) -> Shapes:
    nope, rope, latent = (dims.sizes[name] for name in ("nope", "rope", "key_latent"))
    return {
        "key_down": (latent + rope, dims.hidden),
        "key_gain": (latent,),
        "key_up": (dims.heads * (nope + dims.value_rank), latent),
    }


def _latent_rows(dims: Dimensions) -> dict[str, Rows]:
    nope, rope, latent = (dims.sizes[name] for name in ("nope", "rope", "key_latent"))
    return {
        "key_down": [("key value", latent), ("key", rope)],
        "key_up": [("key", nope), ("value", dims.value_rank)] * dims.heads,
    }


def latent(
    dims: Dimensions, key_down: Tensor, key_gain: Tensor, key_up: Tensor, roles: Collection[str] = ("key", "value")
) -> Factors:
    """Multi-head latent attention: `W_K` and `W_V` as products of their factors, in float32 or better.

    The norm between them as in `latent_queries`. The last `rope` rows of every key head are shared by all heads.
    """
    nope = dims.sizes["nope"] if "key" in roles else 0
    down, gain = _exact(key_down), _exact(key_gain)
    own = _exact(key_up).view(dims.heads, -1, len(gain)) @ (gain[:, None] * down[: len(gain)])
    factors = {"value": own[:, nope:]} if "value" in roles else {}
    if "key" in roles:
        factors["key"] = own.new_empty(dims.heads, dims.rank, dims.hidden)
        factors["key"][:, :nope], factors["key"][:, nope:] = own[:, :nope], down[len(gain) :]
    return factors


def _exact(tensor: Tensor) -> Tensor:
    """At least float32: a product of two rounded factors should not be rounded a third time."""
    return tensor if tensor.element_size() >= 4 else tensor.float()


_QUERY, _KEY, _VALUE = map(_linear, ("query", "key", "value"))
_KEY_VALUE = Part(
    ("key", "value"),
    ("key_value",),
    lambda dims: {"key_value": (dims.kv_heads * (dims.rank + dims.value_rank), dims.hidden)},
    key_value_blocks,
    rows=_key_value_rows,
)
_OUTPUT = Part(("output",), ("output",), lambda dims: {"output": (dims.output_width, dims.heads * dims.value_rank)}, outputs)
_OUTPUT_BESIDE = Part(
    ("output",),
    ("output",),
    lambda dims: {"output": (dims.output_width, 2 * dims.heads * dims.value_rank)},
    outputs_beside,
    rows=lambda dims: {"output": [("output", dims.heads * dims.value_rank), ("", dims.heads * dims.value_rank)]},
    axis=1,
)
_OUTPUT_ROWS = Part(
    ("output",), ("output",), lambda dims: {"output": (dims.heads * dims.value_rank, dims.output_width)}, output_rows
)
_OUTPUT_BY_HEAD = Part(  # from each head to the stream
    ("output",),
    ("output",),
    lambda dims: {"output": (dims.heads, dims.value_rank, dims.output_width)},
    lambda dims, output: {"output": output},
)
_GATED = _fused("query", lambda dims: {"query": (dims.heads * 2 * dims.rank, dims.hidden)}, _gated_order)
_COLUMNS = _fused(
    "fused", lambda dims: {"fused": (dims.hidden, (dims.heads + 2 * dims.kv_heads) * dims.rank)}, _block_order, axis=1
)
_LATENT_QUERY = Part(
    ("query",), ("query_down", "query_gain", "query_up"), _latent_query_shapes, latent_queries, ("nope", "rope", "query_latent")
)
_LATENT = Part(
    ("key", "value"), ("key_down", "key_gain", "key_up"), _latent_shapes, latent, ("nope", "rope", "key_latent"), _latent_rows
)

LAYOUTS: dict[str, tuple[Part, ...]] = {
    "separate": (_QUERY, _KEY, _VALUE, _OUTPUT),
    "key_value_blocks": (_QUERY, _KEY_VALUE, _OUTPUT),
    "beside": (_QUERY, _KEY, _VALUE, _OUTPUT_BESIDE),
    "gated": (_GATED, _KEY, _VALUE, _OUTPUT),
    "blocks": (_fused("fused", _fused_shapes, _block_order), _OUTPUT),
    "column_blocks": (_COLUMNS, _OUTPUT_ROWS),
    "interleaved": (_fused("fused", _fused_shapes, _interleaved_order), _OUTPUT),
    "quarters": (_fused("fused", _quarter_shapes, _quarter_order), _OUTPUT),
    "by_head": (*map(_transposed, ("query", "key", "value")), _OUTPUT_BY_HEAD),
    "latent": (_LATENT_QUERY, _LATENT, _OUTPUT),
    "latent_direct": (_QUERY, _LATENT, _OUTPUT),
}


def extra_sizes_of(layout: str) -> set[str]:
    """The entries of `Dimensions.sizes` that a layout reads."""
    return {size for part in LAYOUTS[layout] for size in part.sizes}


def reads_of(layout: str, roles: tuple[str, ...]) -> set[str]:
    """The tensors that some roles are made of."""
    return {tensor for part in LAYOUTS[layout] if set(part.gives) & set(roles) for tensor in part.reads}


def check_shapes(part: Part, dims: Dimensions, shapes: Shapes, names: Mapping[str, str]) -> None:
    """Refuse tensors whose shapes disagree with the head counts.

    Raises
    ------
    HeadgramError
        Names the tensor, its shape and the shape that the configuration asks for.
    """
    for tensor, expected in part.shapes(dims).items():
        if tuple(shapes[tensor]) != expected:
            raise HeadgramError(
                f"tensor {names[tensor]} has shape {tuple(shapes[tensor])}, but {dims.heads} query and {dims.kv_heads} key heads "
                f"of rank {dims.rank} reading width {dims.hidden} need {expected}: the configuration and the weights disagree"
            )


def undo_gguf_permutation(weight: Tensor, heads: int) -> Tensor:
    """Restore the row order that llama.cpp's converter changed: `(heads · r, d)` in, the same shape out.

    The converter interleaves the two halves of every head for its rotary encoding,
    `reshape(n, 2, r/2, d).swapaxes(1, 2)`; this is the inverse.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)
