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
from functools import cached_property

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from headgram.forms.circuits import qk
from headgram.forms.heads import Heads, read
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


@dataclass(frozen=True)
class RotaryHeads:
    """`qk` forms, and how their layer turns them; what all measures follow from is worked out once.

    Attributes
    ----------
    heads
        `n` forms with keys on the left and queries on the right.
    rotary
        On the device of the heads.

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import qk
    >>> rotary = Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64), interleaved=False)
    >>> turned = RotaryHeads.of(qk(torch.ones(1, 4, 8), torch.ones(1, 4, 8)), rotary)
    >>> energies(turned).planes
    tensor([[128., 128.]], dtype=torch.float64)
    """

    heads: Heads
    rotary: Rotary

    @classmethod
    def of(cls, heads: Heads, rotary: Rotary) -> RotaryHeads:
        """Of forms on any device."""
        return cls(heads, rotary.to(heads.device))

    @cached_property
    def frequencies(self) -> Float[Tensor, " planes"]:
        """Of all planes, in float64: of those of the rotary, and then of rows that are still, 0."""
        first, _ = self._rows
        planes = self.rotary.frequencies.double()
        return torch.nn.functional.pad(planes, (0, len(first) - len(planes)))

    @cached_property
    def _rows(self) -> tuple[Int[Tensor, " planes"], Int[Tensor, " planes"]]:
        """The first and the second row of every plane; a row that is still has a row of zeros, past the last, as its second."""
        first, second = self.rotary.rows
        rank, device = self.heads.rank, self.heads.device
        still = torch.ones(rank, dtype=torch.bool, device=device)
        still[torch.cat([first, second])] = False
        rest = still.nonzero().flatten()
        return torch.cat([first, rest]), torch.cat([second, torch.full_like(rest, rank)])

    def _of_planes(self, matrix: Float[Tensor, "n rank rank"]) -> tuple[Complex[Tensor, "n planes planes"], ...]:
        """Twice `α` and `β` of every two planes.

        The two rows of a plane are the real and the imaginary part of one number. So two rows of the matrix by two columns are a
        map `z -> α z + β conj(z)`.
        """
        padded, rows = torch.nn.functional.pad(matrix, (0, 1, 0, 1)), self._rows
        one, cross, back, two = (padded[:, i][:, :, j] for i in rows for j in rows)
        return torch.complex(one + two, back - cross), torch.complex(one - two, back + cross)

    @cached_property
    def grams(self) -> Pairs:
        """Inner products of forms: `conj(k_t · conj(k_u)) q_t · conj(q_u)` and `conj(k_t · k_u) q_t · q_u`."""
        sides = []
        queries, keys = self.rotary.scaled(self.heads.b), self.heads.a.double()
        for factors, reads in ((queries, self.heads.reads_b), (keys, self.heads.reads_a)):
            sides.append([read(each, reads) for each in self._of_planes(factors @ factors.mT)])
        (q_unitary, q_plain), (k_unitary, k_plain) = sides
        return Pairs(k_unitary.conj() * q_unitary, k_plain.conj() * q_plain)

    def mixed(self) -> tuple[Complex[Tensor, "n planes planes"], ...]:
        """`α` and `β` of `W_Q W_K^T`, whose blocks of planes are `z -> α z + β conj(z)`."""
        matrix = self.rotary.scaled(self.heads.right()) @ self.heads.left().double().mT
        return tuple(each / 2 for each in self._of_planes(matrix))


@dataclass(frozen=True)
class Pairs:
    """Coefficients of `w_t conj(v_u)` and of `w_t v_u` in products that are linear in the weights `w` and `v` of all planes."""

    unitary: Complex[Tensor, "n planes planes"]
    plain: Complex[Tensor, "n planes planes"]

    def inner(self, w: Complex[Tensor, "some planes"], v: Complex[Tensor, "#some planes"]) -> Float[Tensor, "n some"]:
        """`½ Re Σ (unitary_tu w_t conj(v_u) + plain_tu w_t v_u)` for each pair of weights."""
        both = (w @ self.unitary) * v.conj() + (w @ self.plain) * v
        return both.real.sum(-1) / 2


def _turns(frequencies: Float[Tensor, " planes"], offsets: Sequence[int]) -> Complex[Tensor, "offsets planes"]:
    """`e^{iδθ}` of every offset and plane."""
    angles = torch.tensor(offsets, dtype=torch.float64, device=frequencies.device)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


@torch.no_grad()
def energies(turned: RotaryHeads) -> Energies:
    """Energies of every plane; see the example of `RotaryHeads`."""
    planes, turns = len(turned.rotary.frequencies), turned.frequencies != 0
    unitary, plain = (each.real.diagonal(dim1=1, dim2=2)[:, :planes] for each in (turned.grams.unitary, turned.grams.plain))
    energy, difference = (each / 2 * turns[:planes] for each in (unitary, plain))
    rest = (~turns).to(torch.complex128)[None]
    still = turned.grams.inner(rest, rest)[:, 0]
    return Energies(energy, (energy + difference).clamp_min(0), (energy - difference).clamp_min(0), still.clamp_min(0))


@torch.no_grad()
def at_offsets(turned: RotaryHeads, offsets: Sequence[int]) -> AtOffsets:
    """Forms at offsets, in tokens, of the query from the key: `g(δ)` holds scores of a query `δ` tokens after the key.

    Products with transposed forms follow from `M = W_Q W_K^T`: `<g(δ), g(0)^T> = tr(R M M)` and `<g(δ), g(δ)^T> = tr(R M R M)`.
    """
    turn, here = (_turns(turned.frequencies, some) for some in (offsets, [0]))
    alpha, beta = turned.mixed()
    transposes = Pairs(4 * beta * beta.mT.conj(), 4 * alpha * alpha.mT)  # the trace of `z -> α z + β conj(z)` is 2 Re α
    at_home = turned.grams.inner(here, here).clamp_min(0)
    fro_sq = turned.grams.inner(turn, turn).clamp_min(0)
    size = (fro_sq * at_home).sqrt()
    itself = ratio(transposes.inner(turn, turn), fro_sq).clamp(-1, 1)
    return AtOffsets(
        norm=fro_sq.sqrt(),
        cosine=ratio(turned.grams.inner(turn, here), size).clamp(-1, 1),
        transposed=ratio(transposes.inner(turn, here), size).clamp(-1, 1),
        symmetry=(1 + itself) / 2 * (fro_sq > 0),
        trace=2 * (alpha.diagonal(dim1=1, dim2=2) @ turn.mT).real,
    )


@torch.no_grad()
def turning(turned: RotaryHeads, context: int | None) -> Turning:
    """How much of the forms turns, and how fast.

    Parameters
    ----------
    context
        In tokens, if it is known.
    """
    grams, found = turned.grams, energies(turned)
    turns = found.planes.sum(-1)
    lengths = wavelengths(turned.rotary)
    finite = lengths.where(lengths.isfinite(), 0)
    here, there = _turns(turned.frequencies, [0, 1]).split(1)
    step = there - here
    beyond = positional = None
    if context is not None:
        beyond = ratio((found.planes * (lengths > context)).sum(-1), found.total)
        mean = _mean_turn(turned.frequencies, context)[None]
        positional = 1 - ratio(grams.inner(mean, mean)[:, 0], _mean_square(turned, context))
        positional = positional.clamp(0, 1) * (found.total > 0)
    return Turning(
        norm=found.total.sqrt(),
        still=ratio(found.still, found.total),
        wavelength=ratio((found.planes * finite).sum(-1), turns),
        sine=ratio(found.sine.sum(-1), 2 * turns),
        speed=ratio(*(grams.inner(each, each)[:, 0].clamp_min(0).sqrt() for each in (step, here))),
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


def _mean_square(turned: RotaryHeads, context: int) -> Float[Tensor, " n"]:
    """The mean of `‖g(δ)‖²` over the offsets `0 … context - 1`."""
    less, more = (turned.frequencies[:, None] + sign * turned.frequencies for sign in (-1, 1))
    both = turned.grams.unitary * _mean_turn(less, context) + turned.grams.plain * _mean_turn(more, context)
    return both.real.sum((1, 2)) / 2


def _mean_turn(frequencies: Float[Tensor, "*shape"], context: int) -> Complex[Tensor, "*shape"]:
    """The mean of `e^{iδθ}` over `δ = 0 … context - 1`, by Dirichlet's kernel."""
    half = frequencies / 2
    whole = half.sin().abs() < 1e-15
    size = ((context * half).sin() / (context * half.sin().where(~whole, 1))).where(~whole, 1)
    return torch.polar(torch.ones_like(half), (context - 1) * half) * size
