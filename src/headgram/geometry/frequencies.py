"""How a head's form turns with the offset, and how fast, from products of its factors alone.

Let `q_t = q_1 + i q_2` hold the two rows of plane `t` in the queries' weight, and `k_t` those in the keys'; a row that does not
turn is a plane of frequency 0 whose second row is zero. A query turned by `δ` is `e^{iδθ_t} q_t`, and

    g(δ) = W_K^T R(δ) W_Q = Σ_t Re(conj(k_t) e^{iδθ_t} q_t^T) = g_still + Σ_t [cos(δ θ_t) C_t + sin(δ θ_t) S_t]
    C_t = k_1 q_1^T + k_2 q_2^T,  S_t = k_2 q_1^T - k_1 q_2^T

Inner products of such sums with any weights in the place of `e^{iδθ_t}` follow from the Grams `q_t · conj(q_u)` and `q_t · q_u`,
of forms at two offsets, of their mean over a window and of their difference; no form is built. The mean of `‖g(δ)‖²` over all
offsets is `‖g_still‖² + Σ_t E_t`, and

    E_t = ½ (‖q_1‖² + ‖q_2‖²) (‖k_1‖² + ‖k_2‖²) = ½ (‖C_t‖² + ‖S_t‖²)

if frequencies differ from each other and from 0. These energies are the counterpart, from weights alone, of the norms per
frequency of Barbero et al., "Round and round we go! What makes rotary positional encodings useful?" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from headgram.forms.circuits import qk
from headgram.forms.heads import Heads
from headgram.forms.reading import Rotary
from headgram.geometry.ratios import ratio


@dataclass(frozen=True)
class Energies:
    """Of `n` heads: what turns in every plane, and what does not turn at all; float64.

    Attributes
    ----------
    planes : (n, planes)
        `E_t`; 0 of a plane of frequency 0, which does not turn.
    cosine, sine : (n, planes)
        `‖C_t‖²` and `‖S_t‖²`, whose mean is `E_t`.
    still : (n,)
        `‖g_still‖²`, of the rows that no rotation touches.
    """

    planes: Float[Tensor, "n planes"]
    cosine: Float[Tensor, "n planes"]
    sine: Float[Tensor, "n planes"]
    still: Float[Tensor, " n"]

    @property
    def total(self) -> Float[Tensor, " n"]:
        """The mean of `‖g(δ)‖²` over all offsets."""
        return self.still + self.planes.sum(-1)


@dataclass(frozen=True)
class AtOffsets:
    """Forms `g(δ)` of `n` heads at some offsets; float64, all `(n, offsets)`. Of a zero form, ratios are 0.

    Attributes
    ----------
    norm
        `‖g(δ)‖_F`.
    cosine, transposed
        The cosine of `g(δ)` with `g(0)`, and with `g(0)^T`.
    symmetry
        The share of its energy in its symmetric part.
    trace
        `tr g(δ)`.
    """

    norm: Float[Tensor, "n offsets"]
    cosine: Float[Tensor, "n offsets"]
    transposed: Float[Tensor, "n offsets"]
    symmetry: Float[Tensor, "n offsets"]
    trace: Float[Tensor, "n offsets"]


@dataclass(frozen=True)
class Turning:
    """How much of the forms of `n` heads turns, and how fast; float64, `(n,)`. Of a zero form, ratios are 0.

    Attributes
    ----------
    norm
        The root of the mean of `‖g(δ)‖²` over all offsets.
    still
        The share of that mean that no rotation touches.
    wavelength
        The mean wavelength of what turns, weighted by energy, in tokens.
    sine
        The share of the sine parts in the energy of what turns.
    speed
        `‖g(1) - g(0)‖ / ‖g(0)‖`.
    beyond
        The share of the energy at wavelengths longer than the context; None if no context is given.
    positional
        `1 - ‖mean g(δ)‖² / mean ‖g(δ)‖²` over the offsets `0 … context - 1`: what depends on the offset at all. None likewise.
    """

    norm: Float[Tensor, " n"]
    still: Float[Tensor, " n"]
    wavelength: Float[Tensor, " n"]
    sine: Float[Tensor, " n"]
    speed: Float[Tensor, " n"]
    beyond: Float[Tensor, " n"] | None
    positional: Float[Tensor, " n"] | None


@torch.no_grad()
def energies(heads: Heads, rotary: Rotary) -> Energies:
    """Energies of every plane of `qk` forms.

    Parameters
    ----------
    heads
        `n` forms with keys on the left and queries on the right.
    rotary
        How their layer turns them.

    Returns
    -------
    Energies

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import qk
    >>> rotary = Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64), interleaved=False)
    >>> energies(qk(torch.ones(1, 4, 8), torch.ones(1, 4, 8)), rotary).planes
    tensor([[128., 128.]], dtype=torch.float64)
    """
    return _energies(_Grams.of(heads, rotary), len(rotary.frequencies))


def _energies(grams: _Grams, planes: int) -> Energies:
    """Of the first so many planes; the others are still rows."""
    turns = (grams.frequencies != 0).double()
    unitary, plain = (each.real.diagonal(dim1=1, dim2=2)[:, :planes] for each in (grams.unitary, grams.plain))
    alive = turns[:planes]
    energy, difference = unitary / 2 * alive, plain / 2 * alive
    still = grams.inner(1 - turns, 1 - turns)
    return Energies(energy, (energy + difference).clamp_min(0), (energy - difference).clamp_min(0), still.clamp_min(0))


@torch.no_grad()
def at_offsets(heads: Heads, rotary: Rotary, offsets: Sequence[int]) -> AtOffsets:
    """Forms at offsets, in tokens, of the query from the key: `g(δ)` holds scores of a query `δ` tokens after the key."""
    grams = _Grams.of(heads, rotary)
    a, b = heads.left().double(), rotary.scaled(heads.right())
    mixed = b @ a.mT  # (n, r, r): W_Q W_K^T
    here = torch.ones_like(grams.frequencies).to(torch.complex128)
    at_home = grams.inner(here, here).clamp_min(0)
    columns = []
    for offset in offsets:
        turn = torch.polar(torch.ones_like(grams.frequencies), offset * grams.frequencies)
        turned = rotary.turned(mixed, offset)
        fro_sq = grams.inner(turn, turn).clamp_min(0)
        size = (fro_sq * at_home).sqrt()
        columns.append(
            (
                fro_sq.sqrt(),
                ratio(grams.inner(turn, here), size).clamp(-1, 1),
                ratio((mixed.mT * turned).sum((1, 2)), size).clamp(-1, 1),
                (1 + ratio((turned.mT * turned).sum((1, 2)), fro_sq).clamp(-1, 1)) / 2 * (fro_sq > 0),
                turned.diagonal(dim1=1, dim2=2).sum(-1),
            )
        )
    return AtOffsets(*(torch.stack(each, -1) for each in zip(*columns, strict=True)))


@torch.no_grad()
def turning(heads: Heads, rotary: Rotary, context: int | None) -> Turning:
    """How much of `qk` forms turns, and how fast.

    Parameters
    ----------
    context
        In tokens, if it is known.
    """
    grams = _Grams.of(heads, rotary)
    found = _energies(grams, len(rotary.frequencies))
    turns = found.planes.sum(-1)
    lengths = wavelengths(rotary).to(heads.device)
    finite = lengths.where(lengths.isfinite(), 0)
    step = torch.polar(torch.ones_like(grams.frequencies), grams.frequencies) - 1
    here = torch.ones_like(grams.frequencies).to(torch.complex128)
    beyond = positional = None
    if context is not None:
        beyond = ratio((found.planes * (lengths > context)).sum(-1), found.total)
        mean = _mean_turn(grams.frequencies, context)
        positional = (1 - ratio(grams.inner(mean, mean), grams.mean_square(context))).clamp(0, 1) * (found.total > 0)
    return Turning(
        norm=found.total.sqrt(),
        still=ratio(found.still, found.total),
        wavelength=ratio((found.planes * finite).sum(-1), turns),
        sine=ratio(found.sine.sum(-1), 2 * turns),
        speed=ratio(grams.inner(step, step).clamp_min(0).sqrt(), grams.inner(here, here).clamp_min(0).sqrt()),
        beyond=beyond,
        positional=positional,
    )


def by_chance(rotary: Rotary, rank: int) -> Heads:
    """A head whose measures are those of random weights of the same shape, to order `√(r / d)`: its Grams are the identity.

    Rows of independent entries are nearly orthogonal and of equal length where `d` is much larger than `r`.
    """
    weight = torch.eye(rank, dtype=torch.float64, device=rotary.frequencies.device)[None]
    return qk(weight, weight)


def wavelengths(rotary: Rotary) -> Float[Tensor, " planes"]:
    """Tokens of one full turn of every plane; infinite for one that does not turn."""
    return 2 * math.pi / rotary.frequencies.abs()


def offsets_up_to(context: int | None) -> list[int]:
    """0, ±1, ±2, ±3, and powers of two, all up to the context, or up to 1024 where that is not known."""
    most = context if context is not None else 1024
    found = {0, *(sign * near for near in (1, 2, 3) for sign in (1, -1)), *(2**power for power in range(31))}
    return sorted(offset for offset in found if abs(offset) <= most)


@dataclass(frozen=True)
class _Grams:
    """Of every head `conj(k_t · conj(k_u)) q_t · conj(q_u)` and `conj(k_t · k_u) q_t · q_u`; rows that are still come last."""

    frequencies: Float[Tensor, " planes"]
    unitary: Complex[Tensor, "n planes planes"]
    plain: Complex[Tensor, "n planes planes"]

    @classmethod
    def of(cls, heads: Heads, rotary: Rotary) -> _Grams:
        rotary = rotary.to(heads.device)
        first, second = rotary.rows
        still = torch.ones(heads.rank, dtype=torch.bool, device=heads.device)
        still[torch.cat([first, second])] = False
        rows = torch.cat([first, still.nonzero().flatten()])
        sides = []
        for factors, reads in ((rotary.scaled(heads.b), heads.reads_b), (heads.a.double(), heads.reads_a)):
            gram = torch.nn.functional.pad(factors @ factors.mT, (0, 1, 0, 1))  # with a row of zeros, for those that are still
            lower = torch.cat([second, torch.full_like(rows[len(second) :], heads.rank)])
            one, cross, two = gram[:, rows][:, :, rows], gram[:, rows][:, :, lower], gram[:, lower][:, :, lower]
            products = torch.complex(one + two, cross.mT - cross), torch.complex(one - two, cross.mT + cross)
            sides.append([each[reads.to(heads.device)] for each in products])
        (q_unitary, q_plain), (k_unitary, k_plain) = sides
        frequencies = torch.nn.functional.pad(rotary.frequencies.double(), (0, len(rows) - len(first)))
        return cls(frequencies, k_unitary.conj() * q_unitary, k_plain.conj() * q_plain)

    def inner(self, one: Tensor, other: Tensor) -> Float[Tensor, " n"]:
        """`<Σ_t Re(conj(k_t) w_t q_t^T), Σ_u Re(conj(k_u) v_u q_u^T)>` with weights `w`, `v` of the planes."""
        one, other = one.to(torch.complex128), other.to(torch.complex128)
        both = self.unitary * (one[:, None] * other.conj()) + self.plain * (one[:, None] * other)
        return both.real.sum((1, 2)) / 2

    def mean_square(self, context: int) -> Float[Tensor, " n"]:
        """The mean of `‖g(δ)‖²` over the offsets `0 … context - 1`."""
        less, more = (self.frequencies[:, None] + sign * self.frequencies for sign in (-1, 1))
        both = self.unitary * _mean_turn(less, context) + self.plain * _mean_turn(more, context)
        return both.real.sum((1, 2)) / 2


def _mean_turn(frequencies: Float[Tensor, "*shape"], context: int) -> Complex[Tensor, "*shape"]:
    """The mean of `e^{iδθ}` over `δ = 0 … context - 1`, by Dirichlet's kernel."""
    half = frequencies / 2
    whole = half.sin().abs() < 1e-15
    size = ((context * half).sin() / (context * half.sin().where(~whole, 1))).where(~whole, 1)
    return torch.polar(torch.ones_like(half), (context - 1) * half) * size
