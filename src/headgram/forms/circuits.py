"""The two circuits of a head: what it looks for, and what it moves.

    qk    g = W_K^T W_Q      x_k^T g x_q is the score of a key against a query, before scaling, bias and rotary encoding
    ov    o = W_O W_V        o x is what a head writes for the token x that it attends to

After Elhage et al., "A mathematical framework for transformer circuits" (2021). Every head has its own query and output factor;
several heads may share one key and one value factor: head `h` of `H` reads number `h * K // H` of `K`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headgram.errors import HeadgramError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from headgram.forms.heads import Heads


@dataclass(frozen=True)
class Circuit:
    """Which factors make a head's form: the role that each head has for itself, the one that heads may share, and their sides."""

    name: str
    own: str
    shared: str
    shared_is_left: bool

    @property
    def roles(self) -> tuple[str, str]:
        """The own role, then the shared one."""
        return self.own, self.shared

    def heads(
        self,
        own: Float[Tensor, "*layers heads rank own_width"],
        shared: Float[Tensor, "*layers kv_heads rank shared_width"],
        reads: Int[Tensor, " heads"] | None = None,
    ) -> Heads:
        """All heads of one layer or of several, layer by layer.

        Parameters
        ----------
        own : (H, r, d) or (L, H, r, d)
            One factor for every head, any floating dtype, any device.
        shared : (K, r, d) or (L, K, r, d)
            The factors that heads share.
        reads : (H,)
            Which shared factor each head reads; `h * K // H` if not given.

        Raises
        ------
        HeadgramError
            If the shapes do not fit together.
        """
        import torch

        from headgram.forms.heads import Heads

        fitting = own.ndim == shared.ndim and own.ndim in (3, 4) and own.shape[:-3] == shared.shape[:-3]
        if not fitting or own.shape[-2] != shared.shape[-2] or 0 in own.shape or 0 in shared.shape:
            raise HeadgramError(
                f"{self.own.capitalize()} weights (H, r, d) and {self.shared} weights (K, r, d) do not fit together: "
                f"{tuple(own.shape)} and {tuple(shared.shape)}."
            )
        (heads, kv_heads), layers = (own.shape[-3], shared.shape[-3]), own.shape[:-3].numel()
        if kv_heads > heads:
            raise HeadgramError(f"There are more {self.shared} heads ({kv_heads}) than {self.own} heads ({heads}).")
        starts = torch.arange(layers)[:, None] * kv_heads
        of_shared = (starts + (shared_head(heads, kv_heads) if reads is None else reads)).flatten()
        flat = [weights.reshape(-1, *weights.shape[-2:]) for weights in (shared, own)]
        maps = [of_shared, torch.arange(layers * heads)]
        return Heads(*flat, *maps) if self.shared_is_left else Heads(*flat[::-1], *maps[::-1])


CIRCUITS = {
    "qk": Circuit("qk", own="query", shared="key", shared_is_left=True),
    "ov": Circuit("ov", own="output", shared="value", shared_is_left=False),
}


def shared_head(heads: int, kv_heads: int) -> Int[Tensor, " heads"]:
    """Which of `K` key or value heads each of `H` heads reads: `h * K // H`."""
    import torch

    return torch.arange(heads) * kv_heads // heads


def qk(w_q: Float[Tensor, "*layers heads rank hidden"], w_k: Float[Tensor, "*layers kv_heads rank hidden"]) -> Heads:
    """The score forms `g = W_K^T W_Q`, from query weights `(H, r, d)` or `(L, H, r, d)` and key weights `(K, r, d)` or alike."""
    return CIRCUITS["qk"].heads(w_q, w_k)


def ov(w_v: Float[Tensor, "*layers kv_heads rank hidden"], w_o: Float[Tensor, "*layers heads rank written"]) -> Heads:
    """What heads move, `o = W_O W_V`, from value weights `(K, r, d)` and each head's columns of `W_O` transposed, `(H, r, d)`."""
    return CIRCUITS["ov"].heads(w_o, w_v)
