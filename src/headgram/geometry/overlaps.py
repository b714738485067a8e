"""How much two sets of directions span the same subspace.

    overlap = ‖V_a V_b^T‖_F² / k        V_a, V_b: k orthonormal rows each

the mean squared cosine of the principal angles: 1 for equal subspaces, 0 for orthogonal ones, `k / d` on average for random ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

#: Bytes of float64 working memory of one side of a block; a constant, so that the last bit of the result does not depend on
#: the machine.
BLOCK_BYTES = 128 * 2**20


@torch.no_grad()
def overlaps(directions: Float[Tensor, "layers k hidden"], device: str = "cpu") -> Float[Tensor, "layers layers"]:
    """Overlaps of one head's directions in all layers.

    Parameters
    ----------
    directions : (L, k, d)
        Orthonormal rows of any floating dtype; may be mapped from a file, a block of layers is read at a time. A form of a rank
        below `k` has fewer directions, the rest are zero rows: they overlap with nothing.
    device
        Where the products are taken, in float64.

    Returns
    -------
    (L, L) float64
        Symmetric, on the CPU.
    """
    layers, kept, hidden = directions.shape
    step = max(1, BLOCK_BYTES // (8 * kept * hidden))
    upper = torch.zeros(layers, layers, dtype=torch.float64)
    for i in range(0, layers, step):
        rows = directions[i : i + step].to(device, torch.float64)
        for j in range(i, layers, step):
            columns = rows if j == i else directions[j : j + step].to(device, torch.float64)
            products = rows.flatten(0, 1) @ columns.flatten(0, 1).T
            squares = products.square_().view(len(rows), kept, len(columns), kept)
            upper[i : i + step, j : j + step] = squares.sum((1, 3)).cpu() / kept
    return upper.triu() + upper.triu(1).T
