"""How much two sets of directions span the same subspace.

    overlap = ‖V_a V_b^T‖_F² / k        V_a, V_b: k orthonormal rows each

the mean squared cosine of the principal angles: 1 for equal subspaces, 0 for orthogonal ones, `k / d` on average for random ones.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from headgram.forms.heads import Heads
from headgram.geometry.same_index import same_index_products


def overlaps(directions: Float[Tensor, "layers heads k hidden"], device: str = "cpu") -> Float[Tensor, "layers layers heads"]:
    """Overlaps of the directions of every two heads of the same index.

    Parameters
    ----------
    directions : (L, H, k, d)
        Orthonormal rows of any floating dtype; may be mapped from a file. A form of a rank below `k` has fewer directions, the
        rest are zero rows: they overlap with nothing.
    device
        Where the products are taken, in float64.

    Returns
    -------
    (L, L, H) float64
        Symmetric, on the CPU.
    """
    spans = Heads.symmetric(directions.to(device).double().flatten(0, 1))
    return same_index_products(spans, spans, directions.shape[1], "float64").gram.cpu() / directions.shape[2]


def paired_overlaps(one: Float[Tensor, "heads k hidden"], other: Float[Tensor, "heads l hidden"]) -> Float[Tensor, " heads"]:
    """Overlaps of each head's directions with those of the head in the same place of another set, float64.

    Over the smaller number of directions: 1 where one span lies in the other.
    """
    products = one.double() @ other.double().mT
    return products.square().sum((1, 2)) / min(one.shape[1], other.shape[1])
