"""What only the original script defines, number for number, in its float32 arithmetic.

Its `fro_sq` is `‖W_K W_Q^T‖_F²` (not `‖g‖_F²`), its `eig_dirs` are the normalised rows of `V^T W_Q` with `V` from the SVD
of `W_K W_Q^T` (not the singular vectors of `g`). Kept apart from the quantities that headgram stands for; the original's
`sym_eigs` are twice the eigenvalues of the symmetric part and need no function of their own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.forms.heads import Heads
from headgram.geometry.blocks import at_once, by_blocks
from headgram.geometry.costs import ORIGINAL_BYTES
from headgram.geometry.eigen import largest_singular
from headgram.geometry.float32 import whole_float32


@whole_float32()
def original_quantities(heads: Heads, topk: int) -> tuple[Float[Tensor, " heads"], Float[Tensor, "heads k hidden"]]:
    """The original script's `fro_sq` (H,), float64, and `eig_dirs` (H, k, d), float32, of `qk` forms."""
    size = max(1, ORIGINAL_BYTES // (2 * 4 * heads.rank * heads.widths[0]))

    def measure(block: slice) -> tuple[Tensor, Tensor]:
        return _measure(heads.right(block).float(), heads.left(block).float(), min(topk, heads.rank))

    measured = by_blocks(range(len(heads)), size, measure)
    fro_sq, directions = (torch.cat(values) for values in zip(*measured, strict=True))
    return fro_sq, directions


def _measure(
    q: Float[Tensor, "heads rank hidden"], k: Float[Tensor, "heads rank hidden"], topk: int
) -> tuple[Float[Tensor, " heads"], Float[Tensor, "heads k hidden"]]:
    products = k @ q.mT
    if at_once(products.device):
        _, s, right = largest_singular(products.double(), topk)
        s, right = s.float(), right.float()
    else:
        _, s, vh = torch.linalg.svd(products, full_matrices=False)
        right = vh[:, :topk]
    directions = right @ q
    directions = directions / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return s.square().sum(-1).double(), directions
