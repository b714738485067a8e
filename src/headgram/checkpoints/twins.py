"""Random twins: heads of the same shapes and spectra, turned at random in the residual stream, as a control.

Every factor `W (r, d)` becomes `W U` with an orthogonal `U (d, d)` of its own, drawn evenly from all that there are. So a form
`A^T B` keeps its singular values, and each factor its `W W^T`, which biases, norms of queries and keys, and rotary encoding act
on. Whatever two factors, heads or layers have in common is chance.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from headgram.checkpoints.stack import Stack

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def turned(weights: Float[Tensor, "heads rank width"], seed: int, *place: object) -> Float[Tensor, "heads rank width"]:
    """The factors of a layer's heads, each turned at random; float32, or float64 if they are.

    Parameters
    ----------
    weights
        Factors of one role.
    seed, place
        What the rotations follow from: the twin's number, and which factors of a model these are.

    Examples
    --------
    >>> import torch
    >>> weights = torch.arange(6.0).view(1, 2, 3)
    >>> found = turned(weights, 1, "self", 0, "query")
    >>> torch.allclose(found @ found.mT, weights @ weights.mT, atol=1e-5), torch.equal(found, weights)
    (True, False)
    """
    import torch

    key = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    result = torch.empty(weights.shape, dtype=torch.float64 if weights.dtype == torch.float64 else torch.float32)
    for head, weight in enumerate(weights.double()):
        rank, width = weight.shape
        drawn, signs = torch.linalg.qr(torch.randn(width, min(rank, width), generator=generator, dtype=torch.float64))
        frame = drawn * signs.diagonal().sign()  # without the signs, not all frames would be equally likely
        result[head] = torch.linalg.qr(weight.T).R.T @ frame.T
    return result


def as_turned(stack: Stack) -> Stack:
    """A stack whose factors will be turned: it says in which precision they are then."""
    stored = {
        tensor: (count, frozenset({"F64" if "F64" in types else "F32"})) for tensor, (count, types) in stack._stored.items()
    }
    return replace(stack, _stored=stored)
