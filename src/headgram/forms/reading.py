"""What stands between the residual stream and a score besides the projections: the norm that is read, and how positions turn.

A block's projections read `N(x) = γ * C x / |x| + β`: a gain `γ`, centring `C = I - 1 1^T / d` in LayerNorm, a bias `β`. All but
the division can be folded into a form. Rotary encoding (Su et al., 2021) turns a query at position `p` by `R(p)` and a key at `s`
by `R(s)`, so that their score depends on the offset alone: `g(p - s) = W_K^T R(p - s) W_Q`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """What a norm does to what it is given, but for its division by one number per token.

    Attributes
    ----------
    centred
        Whether the mean over channels is taken away first, as in LayerNorm.
    gain, bias : (d,) or (heads, r)
        None where the norm has none. A gain that is stored as `w` but used as `1 + w` is `1 + w` here. Norms of queries and keys
        have a row for each head.
    divides
        Whether there is such a division: not in layer scale, which is a gain alone.
    """

    centred: bool
    gain: Float[Tensor, "*heads width"] | None = None
    bias: Float[Tensor, "*heads width"] | None = None
    divides: bool = True


@dataclass(frozen=True)
class Rotary:
    """How one layer turns its queries and keys: plane `t` by the angle `p * frequencies[t]` at position `p`.

    Attributes
    ----------
    frequencies : (planes,) float64
        Radians per token; the wavelength of a plane is `2 pi / frequency` tokens.
    interleaved
        Plane `t` is the rows `(2t, 2t + 1)` if so, and `(t, t + planes)` if not, counted from `start`.
    start
        The first row that turns; rows outside the planes do not depend on positions.
    factor
        Scales the rows that turn, of queries and of keys alike, as YaRN and LongRoPE do.

    Examples
    --------
    >>> import torch
    >>> rotary = Rotary(torch.tensor([1.0, 0.1]), interleaved=False)
    >>> rotary.rows
    (tensor([0, 1]), tensor([2, 3]))
    """

    frequencies: Float[Tensor, " planes"]
    interleaved: bool
    start: int = 0
    factor: float = 1.0

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The first and the second row of every plane."""
        planes = torch.arange(len(self.frequencies), device=self.frequencies.device)
        if self.interleaved:
            return self.start + 2 * planes, self.start + 2 * planes + 1
        return self.start + planes, self.start + planes + len(planes)

    def to(self, device: torch.device) -> Rotary:
        """On another device."""
        return replace(self, frequencies=self.frequencies.to(device))

    def turned(self, factors: Float[Tensor, "*n rank width"], offset: int | float | Tensor) -> Float[Tensor, "*n rank width"]:
        """`R(offset)` times factors, in float64, without the factor.

        Parameters
        ----------
        factors : (..., r, width)
            Queries or keys, or the weights that they come from.
        offset
            In tokens; a tensor `(width,)` has one for each column.
        """
        here = self.to(factors.device)
        first, second = here.rows
        offsets = torch.as_tensor(offset, dtype=torch.float64, device=factors.device)
        angles = offsets * here.frequencies[:, None]
        result = factors.double().clone()
        one, other = result[..., first, :], result[..., second, :]
        result[..., first, :] = one * angles.cos() - other * angles.sin()
        result[..., second, :] = one * angles.sin() + other * angles.cos()
        return result

    def scaled(self, factors: Float[Tensor, "*n rank width"]) -> Float[Tensor, "*n rank width"]:
        """Factors whose rows that turn are multiplied by the square of `factor`: its part in a score."""
        if self.factor == 1:
            return factors.double()
        scale = torch.ones(factors.shape[-2], dtype=torch.float64, device=factors.device)
        scale[torch.cat(self.to(factors.device).rows)] = self.factor**2
        return factors.double() * scale[:, None]


@dataclass(frozen=True)
class Frame:
    """What stands around the projections of one layer: None where there is nothing, or where it is not known.

    Attributes
    ----------
    norm
        What the block's norm does to the stream before queries are projected from it.
    source_norm
        Likewise of keys and values: the same, but in cross-attention, where it is the output norm of the stack that they read.
    query_norm, key_norm
        Norms of queries and keys, with a row of gains for each head.
    output_norm
        What a norm, or a gain alone, does to all that heads write together, before it is added to the stream.
    query_bias, key_bias : (H, r) and (K, r)
        What is added to `W_Q x` and to `W_K x`.
    rotary
        How positions turn queries and keys.
    scale, cap
        Scores are `c tanh(scale x_k^T g x_q / c)` with a bound `c`.
    """

    norm: Norm | None = None
    source_norm: Norm | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    output_norm: Norm | None = None
    query_bias: Float[Tensor, "heads rank"] | None = None
    key_bias: Float[Tensor, "kv_heads rank"] | None = None
    rotary: Rotary | None = None
    scale: float | None = None
    cap: float | None = None

    def read_norm(self, role: str) -> Norm | None:
        """The norm of the stream that a role's projection reads."""
        return self.norm if role == "query" else self.source_norm


@dataclass(frozen=True)
class Frames:
    """The frames of a stack's layers, by index.

    Attributes
    ----------
    missing
        The roles that are not known, each with a sentence that says why.
    context
        The most tokens that the model was made for; None if its configuration does not say.
    latent
        Whether weights are products of two, between which latent vectors are divided by norms.
    scores, writes
        What else stands between a form and the model's scores, and what heads write; one clause each.
    """

    layers: Mapping[int, Frame]
    missing: Mapping[str, str] = field(default_factory=dict)
    context: int | None = None
    latent: bool = False
    scores: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
