"""Where a checkpoint keeps what tokens are read as, and what they are written by: found by the names that models give them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from headgram.checkpoints.stores import TensorStore

#: How the tensors end that hold a row for every token, by what they are for.
_NAMES = {
    "input": r"embed_tokens|wte|word_embeddings|tok_embeddings|tokens_embed|embed_in|shared|token_embd",
    "output": r"lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder|output",
}


@dataclass(frozen=True)
class Embedding:
    """A tensor with a row for every token."""

    store: TensorStore
    name: str

    def slices(self, rows: int) -> Iterator[Float[Tensor, "_ width"]]:
        """All rows, so many at a time, in stored precision or float32."""
        return self.store.slices(self.name, rows)


def embedding_names(store: TensorStore, width: int) -> dict[str, str]:
    """The tensors with a row of some width for every token: `input`, and `output`, the same tensor where models tie them.

    Neither is there where the checkpoint has no such tensor, as of models that read pictures.
    """
    found: dict[str, str] = {}
    for use, names in _NAMES.items():
        pattern = re.compile(rf"(.*\.)?({names})\.weight")
        fitting = [name for name in store.names() if pattern.fullmatch(name) and _has_rows(store, name, width)]
        if fitting:
            found[use] = min(fitting, key=lambda name: (name.count("."), len(name), name))
    if "input" in found:
        found.setdefault("output", found["input"])
    return found


def _has_rows(store: TensorStore, name: str, width: int) -> bool:
    shape = store.shape(name)
    return len(shape) == 2 and shape[1] == width
