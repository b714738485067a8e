"""From one set of heads to another: the forms turned round, multiplied, or in other coordinates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.forms.heads import Heads
from headgram.forms.reading import Frame, Norm


def transposed(heads: Heads) -> Heads:
    """The forms `X^T = B^T A`."""
    return Heads(heads.b, heads.a, heads.reads_b, heads.reads_a)


def product(x: Heads, y: Heads) -> Heads:
    """The forms `X_i Y_i`, in float64: what one head makes of what another hands on.

    `A_x^T (B_x A_y^T) B_y`: the rank is that of the left forms.
    """
    joint = x.right().double() @ y.left().double().mT
    places = torch.arange(len(x))
    return Heads(x.left().double(), joint @ y.right().double(), places, places)


def with_orthonormal_left(heads: Heads) -> Heads:
    """The same forms in float64 with orthonormal left factors, `m = min(r, width)` rows: `X = U (R B)`.

    No product of these factors is larger than the forms themselves, so nothing cancels where a form is much smaller than its
    weights.
    """
    basis, upper = torch.linalg.qr(heads.a.double().mT)
    right = upper[heads.reads_a.to(heads.device)] @ heads.right().double()
    return Heads(basis.mT, right, heads.reads_a, torch.arange(len(heads)))


def read_through(norm: Norm | None, vectors: Float[Tensor, "*some width"]) -> Float[Tensor, "*some width"]:
    """Vectors `v` that read what a norm hands on, as vectors that read the stream before it: `C (γ * v)`, in float64."""
    result = vectors.double()
    if norm is None:
        return result
    result = result if norm.gain is None else result * norm.gain.to(result)
    return result - result.mean(-1, keepdim=True) if norm.centred else result


def handed_on(norm: Norm | None, vectors: Float[Tensor, "*some width"]) -> Float[Tensor, "*some width"]:
    """What a norm makes of vectors `v` of the stream before it, but for the division: `γ * C v`, in float64."""
    result = vectors.double()
    if norm is None:
        return result
    result = result - result.mean(-1, keepdim=True) if norm.centred else result
    return result if norm.gain is None else result * norm.gain.to(result)


def folded(
    role: str, factors: Float[Tensor, "n rank width"], frame: Frame, heads: slice = slice(None)
) -> Float[Tensor, "n rank width"]:
    """Factors of one layer as functions of the stream that its norm divides, in float64: `diag(γ_q) C_q W diag(γ) C`.

    Gains and centring are folded in, of the block's norm and of norms of queries and keys. What is not: divisions, and biases,
    which add terms that are linear in one token. Of outputs, it is the norm of what all heads write together, if there is one.

    Parameters
    ----------
    role
        `query`, `key`, `value` or `output`.
    factors : (n, r, width)
        Of some heads, or of the keys or values that they share.
    frame
        What stands around the layer's projections.
    heads
        Which of the layer's factors these are, where norms of queries and keys have gains of their own for each.
    """
    if role == "output":
        return handed_on(frame.output_norm, factors)
    result = read_through(frame.read_norm(role), factors)
    own = {"query": frame.query_norm, "key": frame.key_norm}.get(role)
    if own is not None:
        result = result - result.mean(-2, keepdim=True) if own.centred else result
        result = result if own.gain is None else result * own.gain[heads, :, None].to(result)
    return result


def constant(
    role: str, factors: Float[Tensor, "n rank width"], bias: Float[Tensor, "n rank"] | None, frame: Frame
) -> Float[Tensor, "n rank"] | None:
    """What `folded` factors times the stream lack to be queries or keys, in float64: `diag(γ_q) C_q (b + W β)`; None if nothing.

    Parameters
    ----------
    bias
        What is added to `W x`.
    """
    norm = frame.read_norm(role)
    beta = None if norm is None else norm.bias
    if bias is None and beta is None:
        return None
    wide = factors.double()
    added = wide.new_zeros(wide.shape[:-1]) if bias is None else bias.to(wide)
    added = added if beta is None else added + wide @ beta.to(wide)
    own = Frame(query_norm=frame.query_norm, key_norm=frame.key_norm)
    return folded(role, added[..., None], own)[..., 0]
