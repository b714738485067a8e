"""What only the original script defines, number for number, in its float32 arithmetic.

Its `fro_sq` is `‖W_K W_Q^T‖_F²` (not `‖g‖_F²`), its `eig_dirs` are the normalised rows of `V^T W_Q` with `V` from the SVD
of `W_K W_Q^T` (not the singular vectors of `g`). Kept apart from the quantities that headgram stands for; the script's
`sym_eigs` are twice the eigenvalues of the symmetric part and need no function of their own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.geometry.batches import at_once
from headgram.geometry.eigen import largest_singular
from headgram.geometry.grouping import key_head

#: Bytes of float32 weights of a batch of heads. A constant, so that the last bit of the result does not depend on the machine.
BATCH_BYTES = 128 * 2**20


def original_quantities(
    w_q: Float[Tensor, "heads rank hidden"], w_k: Float[Tensor, "kv_heads rank hidden"], topk: int
) -> tuple[Float[Tensor, " heads"], Float[Tensor, "heads k hidden"]]:
    """The script's `fro_sq` (H,), float64, and `eig_dirs` (H, k, d), float32, of one layer."""
    heads, rank, hidden = w_q.shape
    reads = key_head(heads, len(w_k))
    size = max(1, BATCH_BYTES // (2 * 4 * rank * hidden))
    batches = [slice(start, start + size) for start in range(0, heads, size)]
    measured = [_measure(w_q[batch].float(), w_k[reads[batch]].float(), min(topk, rank)) for batch in batches]
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
