"""The projection kernel: how much of the space that one head reads or writes lies in that of another.

The rows of a factor `(r, d)` span a subspace of the residual stream: what a head's queries, keys or values read of it, or what it
writes into it. With the projectors `P` onto two of them, of `k_a` and `k_b` dimensions,

    kernel = <P_a, P_b> = ‖U_a U_b^T‖_F²      the sum of the squared cosines of their principal angles, in [0, min(k_a, k_b)]

whatever basis `U` of orthonormal rows, and however long the rows of the factors. If one subspace is turned by a Haar-random
rotation, exactly (Collins & Śniady, Comm. Math. Phys. 264, 2006)

    mean        k_a k_b / d
    variance    2 k_a (d - k_a) k_b (d - k_b) / (d² (d-1) (d+2))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgram.forms.heads import Heads, below
from headgram.geometry.blocks import FACTOR_BYTES, by_blocks
from headgram.geometry.inner import inner_products
from headgram.geometry.nulls import Moments, deviations
from headgram.geometry.ratios import ratio
from headgram.geometry.triangles import triangles

#: Diagonals of triangles below this share of the largest say that rows are nearly dependent.
_PIVOT = 1e-3


@dataclass(frozen=True)
class Spans:
    """Subspaces, each as the form of its projector.

    Attributes
    ----------
    forms
        `U_i^T U_i` with orthonormal rows, and rows of zeros where the factor's rank falls short; float32.
    ranks : (n,)
        The dimensions of each, on the CPU.
    """

    forms: Heads
    ranks: Int[Tensor, " n"]


@torch.no_grad()
def spans(factors: Float[Tensor, "n rank width"]) -> Spans:
    """The spans of the rows of factors, of numerical rank in float64."""

    def measure(block: slice) -> Spans:
        some = factors[block]
        _, rank, width = some.shape
        wide = some.double()
        wide = ratio(wide, wide.norm(dim=-1, keepdim=True))
        bases = torch.zeros(len(wide), min(rank, width), width, dtype=torch.float64, device=wide.device)
        upper = triangles(wide)
        pivots = upper.diagonal(dim1=1, dim2=2).abs()
        plain = (pivots.amin(-1) > _PIVOT) & (rank <= width)
        if bool(plain.any()):
            bases[plain] = torch.linalg.solve_triangular(upper[plain].mT, wide[plain], upper=False)
        if not bool(plain.all()):
            _, s, v = torch.linalg.svd(wide[~plain], full_matrices=False)
            bases[~plain] = v * (s > max(rank, width) * torch.finfo(torch.float64).eps * s[:, :1])[:, :, None]
        return Spans(Heads.symmetric(bases.float()), (bases != 0).any(-1).sum(-1).cpu())

    size = max(1, FACTOR_BYTES[factors.device.type] // (8 * factors[0].numel()))
    return joined(list(by_blocks(range(len(factors)), size, measure)))


def joined(parts: Sequence[Spans]) -> Spans:
    """Several sets, one after the other."""
    return Spans(Heads.symmetric(below([part.forms.a for part in parts])), torch.cat([part.ranks for part in parts]))


@torch.no_grad()
def kernels(x: Spans, y: Spans) -> tuple[Float[Tensor, "n_x n_y"], Float[Tensor, "n_x n_y"]]:
    """The projection kernel of every two, and how many deviations it is from its mean by chance; float64, on the CPU.

    0 deviations where it cannot deviate: where a span is nothing, or everything.

    Examples
    --------
    >>> import torch
    >>> from headgram.geometry.spans import kernels, spans
    >>> both = spans(torch.eye(4).view(2, 2, 4))  # two planes that have nothing in common
    >>> kernels(both, both)[0]
    tensor([[2., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    k_a, k_b = x.ranks.double(), y.ranks.double()
    kernel = inner_products(x.forms, x.forms if x is y else y.forms).gram.cpu()
    kernel = kernel.clamp_min(0).minimum(torch.minimum(k_a[:, None], k_b))
    return kernel, deviations(kernel, Moments(k_a, k_a), Moments(k_b, k_b), x.forms.widths[0])
