"""Llama's original layout, which Meta and Mistral publish: under transformers' names, with rows in transformers' order.

Meta's code (`llama/model.py`) turns neighbouring rows of a head by the rotary encoding, transformers' turns row `i` with row
`i + r/2`. So transformers' converter (`convert_llama_weights_to_hf.py`, `permute`) reorders the rows of queries and keys, and the
same is done here. In parallel training each process saves a slice of every weight, as a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headgram.checkpoints.stores import TensorStore, cut_of
from headgram.checkpoints.views import Renamed
from headgram.errors import HeadgramError
from headgram.families.layouts import Cut, undo_gguf_permutation

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"(.*?)layers\.(\d+)\.(attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.(\w+)")
_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OTHER_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: Along which axis parallel training cuts a weight; norms are whole everywhere.
_CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
_SIGN = ".attention.wq.weight"


def in_transformers_names(store: TensorStore, config: Mapping[str, Any] | None, where: str) -> TensorStore:
    """The store itself or, if it is in the original layout, as transformers would have it.

    Raises
    ------
    HeadgramError
        If it is, and the configuration does not state the numbers of heads that the rows belong to, or states other rows.
    """
    names = store.names()
    queries = next((name for name in names if f".{name}".endswith(_SIGN)), None)
    if queries is None:
        return store
    stated = config or {}
    heads: Any = stated.get("num_attention_heads")
    counts = {"self_attn.q_proj.": heads, "self_attn.k_proj.": stated.get("num_key_value_heads") or heads}
    if not all(type(count) is int and count > 0 for count in counts.values()):
        raise HeadgramError(f"{where} is in llama's original layout, but no params.json beside it states `n_heads`: put it there")
    head_dim, hidden = stated.get("head_dim"), stated.get("hidden_size")
    rows = heads * head_dim if type(head_dim) is int else hidden
    if type(rows) is int and queries in store and store.shape(queries)[:1] != (rows,):
        raise HeadgramError(
            f"tensor {queries:.200} of {where} has {next(iter(store.shape(queries)), 0)} rows, and its configuration asks for "
            f"{rows}: fetch all files again, for each may hold a slice of every weight"
        )
    return OriginalLlama(store, {_new_name(name): name for name in names}, counts)


def _new_name(name: str) -> str:
    if found := _LAYER.fullmatch(name):
        return f"{found[1]}model.layers.{found[2]}.{_LAYER_NAMES[found[3]]}.{found[4]}"
    return _OTHER_NAMES.get(name, name)


class OriginalLlama(Renamed):
    """Tensors under other names, with the rows of queries and keys in transformers' order.

    Parameters
    ----------
    store, stored
        As of `Renamed`.
    counts
        By a piece of a name, the number of heads that the tensor's rows belong to.
    """

    def __init__(self, store: TensorStore, stored: Mapping[str, str], counts: Mapping[str, int]) -> None:
        super().__init__(store, stored)
        self._counts = counts

    def is_stored(self, name: str) -> bool:
        return not any(piece in name for piece in self._counts)

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        self.dtype(name)
        return self.part(name, cut)

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        return super().part(name, cut) if self.is_stored(name) else cut_of(self._turned(name), cut)

    def _turned(self, name: str) -> Tensor:
        tensor = super().part(name)
        count = next(count for piece, count in self._counts.items() if piece in name)
        if len(tensor) % (2 * count):
            raise HeadgramError(
                f"tensor {name} has {len(tensor)} rows, which do not divide into pairs for {count} heads: "
                "correct `n_heads` in params.json"
            )
        return undo_gguf_permutation(tensor.reshape(len(tensor), -1), count).reshape(tensor.shape)


class SlicedStore(TensorStore):
    """The files of parallel training, each with a slice of every weight, as one store."""

    def __init__(self, slices: Sequence[TensorStore]) -> None:
        self._slices = slices

    def _cut(self, name: str) -> int | None:
        """The axis along which a tensor is cut; None if every file has all of it."""
        shapes = [store.shape(name) for store in self._slices]
        module = name.split(".")[-2] if "." in name else name
        if module == "tok_embeddings":  # along the width in Llama 1 and 2, along the tokens in 3
            return 0 if shapes[0][-1:] == self._slices[0].shape("norm.weight") else 1
        return _CUT.get(module) if len(shapes[0]) == 2 else None

    def __contains__(self, name: str) -> bool:
        return all(name in store for store in self._slices)

    def names(self) -> Collection[str]:
        return self._slices[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [list(store.shape(name)) for store in self._slices]
        axis = self._cut(name)
        if axis is None:
            return tuple(shapes[0])
        rows = sum(shape.pop(axis) for shape in shapes)
        if any(shape != shapes[0] for shape in shapes):
            raise HeadgramError(f"the slices of tensor {name} do not fit together: fetch all files again")
        return (rows, *shapes[0]) if axis == 0 else (*shapes[0], rows)

    def stored(self, name: str) -> str:
        words = {store.stored(name) for store in self._slices}
        if len(words) > 1:
            raise HeadgramError(f"the slices of tensor {name} are stored as {' and '.join(sorted(words))}: fetch all files again")
        return words.pop()

    def nbytes(self, name: str) -> int:
        return sum(store.nbytes(name) for store in self._slices) if self._cut(name) is not None else self._slices[0].nbytes(name)

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        self.shape(name)
        axis = self._cut(name)
        if axis is None:
            return self._slices[0].part(name, cut)
        import torch

        return cut_of(torch.cat([store.part(name) for store in self._slices], axis), cut)
