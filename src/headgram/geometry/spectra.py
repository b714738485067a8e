"""The spectrum of every head of a set.

A form `X = A^T B` is of size `(d, d)` and of rank at most `r`. It is never formed: everything follows from the small matrices of
`headgram.geometry.triangles`. Products of the factors are factored where that is accurate, to a few units of rounding of `sum_i
‖a_i‖ ‖b_i‖` over the rows; the factors themselves elsewhere: where `2r > d`, where rows are nearly dependent and where one is
zero. Rows are balanced before: `X` does not change if a row of `B` is multiplied by what its row of `A` is divided by, rounding
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.described import Described
from headgram.errors import HeadgramError
from headgram.forms.heads import Heads
from headgram.forms.transforms import transposed
from headgram.geometry.blocks import at_once, by_blocks
from headgram.geometry.checks import check_weights, is_finite
from headgram.geometry.costs import SPECTRA_BYTES, spectrum_bytes
from headgram.geometry.eigen import largest_magnitude, largest_singular
from headgram.geometry.ratios import ZERO, effective_rank, ratio
from headgram.geometry.residuals import Residuals, direction_residuals, identity_residuals
from headgram.geometry.scores import directionality
from headgram.geometry.triangles import Own, Products, Shared, Triangles, by_cholesky, by_householder, column_norms, products

#: What each number of a spectrum is, in a few words.
_MEANINGS = {
    "singular_values": "singular values, descending",
    "right": "top directions on the query side (of `ov`: what is read)",
    "left": "top directions on the key side (of `ov`: what is written)",
    "symmetric_eigenvalues": "eigenvalues of the symmetric part, largest magnitude first",
    "signed": "top eigenvectors of the symmetric part",
    "fro_sq": "squared Frobenius norm",
    "trace": "trace",
    "self_overlap": "inner product with its own transpose",
    "spectral_norm": "largest singular value",
    "nuclear_norm": "sum of the singular values",
    "stable_rank": "energy over that of the strongest channel",
    "effective_rank": "exponential of the entropy of the energies",
    "symmetry": "1 symmetric, 0 antisymmetric, near 0.5 by chance",
    "positive_energy": "share of the squared eigenvalues that belongs to positive ones",
    "directionality": "1 if only the right side has large norms, -1 if only the left side",
    "residual": "largest residual of the identities",
}


@dataclass(frozen=True, repr=False)
class Spectrum(Described):
    """What is measured of `H` heads; float64, on the device of the weights.

    `k = min(topk, r)`; ranks that fall short are padded with zeros: zero values, zero rows. The ratios of a zero head are 0.

    Attributes
    ----------
    singular_values : (H, r)
        Singular values of `X`, descending.
    right, left : (H, k, d)
        Rows `v_i` (of `qk` the query side) and `u_i` (the key side) with `X v_i = s_i u_i`. The entry of largest
        magnitude of every `v_i` is positive (ties: the first), `u_i` follows.
    symmetric_eigenvalues : (H, 2r)
        Signed eigenvalues of `(X + X^T)/2`, largest magnitude first (ties: the positive one first).
    signed : (H, k, d)
        Eigenvectors of the `k` largest of them, signed like `right`.
    fro_sq, trace, self_overlap : (H,)
        `‖X‖_F²`, `tr X` and `<X, X^T> = tr(X X)`.
    spectral_norm, nuclear_norm : (H,)
        `s_1` and `sum(s)`.
    stable_rank, effective_rank : (H,)
        `fro_sq / s_1²` and the exponential of the entropy of `s² / sum(s²)` (Roy & Vetterli, 2007).
    symmetry : (H,)
        `(fro_sq + self_overlap) / (2 fro_sq)`: 1 for symmetric, 0 for antisymmetric forms.
    positive_energy : (H,)
        Share of `sum(λ²)` at `λ > 0`.
    directionality : (H,)
        In `[-1, 1]`: 1 if only the right side has large norms, -1 if only the left side has (see
        `headgram.geometry.scores`).
    residual : (H,)
        Largest residual of the identities that every result must satisfy, see `headgram.geometry.residuals`.
    """

    singular_values: Float[Tensor, "heads rank"]
    right: Float[Tensor, "heads k hidden"]
    left: Float[Tensor, "heads k hidden"]
    symmetric_eigenvalues: Float[Tensor, "heads 2*rank"]
    signed: Float[Tensor, "heads k hidden"]
    fro_sq: Float[Tensor, " heads"]
    trace: Float[Tensor, " heads"]
    self_overlap: Float[Tensor, " heads"]
    spectral_norm: Float[Tensor, " heads"]
    nuclear_norm: Float[Tensor, " heads"]
    stable_rank: Float[Tensor, " heads"]
    effective_rank: Float[Tensor, " heads"]
    symmetry: Float[Tensor, " heads"]
    positive_energy: Float[Tensor, " heads"]
    directionality: Float[Tensor, " heads"]
    residual: Float[Tensor, " heads"]

    def _described(self) -> tuple[str, list[dict[str, object]]]:
        (heads, rank), (_, kept, width) = self.singular_values.shape, self.right.shape
        shapes = {name: tuple(getattr(self, name).shape) for name in _MEANINGS}
        line = f"Spectrum of {heads} heads: rank {rank}, width {width}, {kept} directions kept"
        return line, [{"number": name, "shape": shapes[name], "meaning": meaning} for name, meaning in _MEANINGS.items()]


@torch.no_grad()
def spectra(heads: Heads, topk: int = 8) -> Spectrum:
    """Measure every head of a set.

    Parameters
    ----------
    heads
        Square forms.
    topk
        Directions to keep.

    Raises
    ------
    HeadgramError
        If the forms are not square, a weight is not finite, or a norm overflows float64.

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import ov
    >>> from headgram.geometry.spectra import spectra
    >>> found = spectra(ov(w_v=torch.randn(2, 4, 16), w_o=torch.randn(6, 4, 16)), topk=3)
    >>> found.singular_values.shape, found.right.shape
    (torch.Size([6, 4]), torch.Size([6, 3, 16]))
    """
    _check(heads, topk)
    shared_right = len(heads.b) < len(heads.a)
    result = _joined(list(_measured(transposed(heads) if shared_right else heads, topk)))
    if not is_finite(*(getattr(result, field.name) for field in fields(Spectrum))):
        raise HeadgramError("A head's norm overflows float64: rescale its weights.")
    return _of_transposed(result) if shared_right else result


def _of_transposed(result: Spectrum) -> Spectrum:
    """The spectrum of `X`, from that of `X^T`."""
    sign = signs(result.left)
    return replace(result, right=result.left * sign, left=result.right * sign, directionality=-result.directionality)


def _measured(heads: Heads, topk: int) -> Iterator[Spectrum]:
    """Batches of heads, in order: on a CPU of heads that share the products of their left factor, else of any."""
    size = max(1, SPECTRA_BYTES[heads.device.type] // spectrum_bytes(heads.rank, heads.widths[0], topk))

    def measure(block: slice, left: slice) -> Spectrum:
        return _measure_block(heads.right(block).double(), heads.left(left).double(), topk)

    if at_once(heads.device):
        yield from by_blocks(range(len(heads)), size, lambda block: measure(block, block))
        return
    start = 0
    for count in heads.reads_a.unique_consecutive(return_counts=True)[1].tolist():
        one = slice(start, start + 1)  # which stands for all that share its left factor
        yield from by_blocks(range(start, start + count), size, partial(measure, left=one))
        start += count


def _joined(blocks: Sequence[Spectrum]) -> Spectrum:
    return Spectrum(**{field.name: torch.cat([getattr(block, field.name) for block in blocks]) for field in fields(Spectrum)})


def _check(heads: Heads, topk: int) -> None:
    rows, columns = heads.widths
    if rows != columns:
        raise HeadgramError(f"Spectra are measured of square forms, not of ({rows}, {columns}).")
    if topk < 1:
        raise HeadgramError(f"topk is {topk}, but at least one direction must be kept.")
    check_weights("left", heads.a)
    check_weights("right", heads.b)


def _measure_block(b: Own, a: Shared, topk: int) -> Spectrum:
    """Everything of a block of heads, and of the left factor that they share or of one for each; float64."""
    if 2 * b.shape[1] > b.shape[2]:
        return _balanced_spectrum(b, a, topk)
    of = products(b, a)
    factors, trusted = by_cholesky(b, a, of)
    if bool(trusted.all()):
        return _from_factors(factors, of, b, a, topk)
    parts, order = [], []
    for these, measure in ((trusted, _cholesky_spectrum), (~trusted, _balanced_spectrum)):
        if len(heads := these.nonzero().flatten()):
            parts.append(measure(b[heads], a if len(a) == 1 else a[heads], topk))
            order.append(heads)
    places = torch.cat(order).argsort()
    joined = _joined(parts)
    return Spectrum(**{field.name: getattr(joined, field.name)[places] for field in fields(Spectrum)})


def _cholesky_spectrum(b: Own, a: Shared, topk: int) -> Spectrum:
    of = products(b, a)
    return _from_factors(by_cholesky(b, a, of)[0], of, b, a, topk)


def _balanced_spectrum(b: Own, a: Shared, topk: int) -> Spectrum:
    b, a, unit = _balanced(b, a)
    result = _from_factors(by_householder(b, a), products(b, a), b, a, topk)
    powers = {"singular_values": 1, "symmetric_eigenvalues": 1, "trace": 1, "spectral_norm": 1, "nuclear_norm": 1}
    powers |= {"fro_sq": 2, "self_overlap": 2}
    scaled = {name: getattr(result, name) for name in powers}
    scaled = {name: value * (unit ** powers[name]).view(-1, *[1] * (value.ndim - 1)) for name, value in scaled.items()}
    return replace(result, **scaled)


def _from_factors(factors: Triangles, of: Products, b: Own, a: Shared, topk: int) -> Spectrum:
    rank = b.shape[1]
    kept = min(topk, rank)
    lengths = [product.diagonal(dim1=1, dim2=2).sqrt() for product in (of.bb, of.aa)]
    unit = (lengths[0] * lengths[1]).sum(1)  # (H,): at most ‖A‖ ‖B‖, and the same however rows are balanced
    zero = ZERO * unit

    left, s, right = largest_singular(factors.core, min(kept, *factors.core.shape[1:]))
    s = s.where(s > zero[:, None], 0)
    eigenvalues, vectors = largest_magnitude(factors.symmetric, min(kept, factors.symmetric.shape[-1]))
    eigenvalues = eigenvalues.where(eigenvalues.abs() > zero[:, None], 0)

    right, left, signed = factors.lift(right, left, vectors)
    sign = signs(right) * (s[:, :kept, None] > 0)
    right, left = right * sign, left * sign
    signed = signed * signs(signed) * (eigenvalues[:, : signed.shape[1], None] != 0)

    s, right, left = _pad(s, rank), _pad_rows(right, kept), _pad_rows(left, kept)
    eigenvalues, signed = _pad(eigenvalues, 2 * rank), _pad_rows(signed, kept)

    # What is reported follows from the spectra, which stay accurate where products of weights cancel; the products check it.
    energy, power = s.square().sum(-1), eigenvalues.square().sum(-1)
    unit = unit.where(unit > 0, 1)
    residuals = Residuals(
        *identity_residuals(of, s, eigenvalues, unit),
        *direction_residuals(b, a, s, right, left, eigenvalues, signed, unit),
    )
    return Spectrum(
        singular_values=s,
        right=right,
        left=left,
        symmetric_eigenvalues=eigenvalues,
        signed=signed,
        fro_sq=energy,
        trace=of.ba.diagonal(dim1=1, dim2=2).sum(1) * (energy > 0),
        self_overlap=2 * power - energy,
        spectral_norm=s[:, 0],
        nuclear_norm=s.sum(-1),
        stable_rank=ratio(energy, s[:, 0].square()),
        effective_rank=effective_rank(s),
        symmetry=ratio(power, energy).clamp(0, 1),
        positive_energy=ratio(eigenvalues.clamp_min(0).square().sum(-1), power),
        directionality=directionality(*_column_norms(factors, b, a, zero)),
        residual=residuals.largest(),
    )


def _column_norms(
    of: Triangles, b: Own, a: Shared, zero: Float[Tensor, " heads"]
) -> tuple[Float[Tensor, "heads hidden"], Float[Tensor, "heads hidden"]]:
    """Norms of the columns of `X` and of `X^T`; those below `zero`, which are rounding, are 0."""
    norms = column_norms(of.triangle_a, b), column_norms(of.triangle_b, a)
    right, left = (norm.where(norm > zero[:, None], 0) for norm in norms)
    return right, left


def _balanced(b: Own, a: Shared) -> tuple[Own, Own, Float[Tensor, " heads"]]:
    """Weights of a form whose rows come in pairs of equal size and are at most about 1, and the factor to the given form.

    All factors are powers of two, so nothing is rounded. A row whose partner is zero adds nothing to the form.
    """
    size_b, size_a = (weight.abs().amax(-1, keepdim=True) for weight in (b, a))
    alive = (size_b > 0) & (size_a > 0)
    shift = ((size_a.log2() - size_b.log2()) / 2).round().where(alive, 0)
    b, a = torch.ldexp(b, shift).where(alive, 0), torch.ldexp(a, -shift).where(alive, 0)
    largest = torch.maximum(b.abs(), a.abs()).amax((-1, -2), keepdim=True)
    exponent = largest.log2().floor().where(largest > 0, 0)
    return torch.ldexp(b, -exponent), torch.ldexp(a, -exponent), torch.exp2(2 * exponent.flatten())


def signs(rows: Float[Tensor, "heads k hidden"]) -> Float[Tensor, "heads k 1"]:
    """The factor that makes the entry of largest magnitude positive (ties: the first).

    Entries within 1e-9 of the largest are ties: rounding must not choose between them.
    """
    magnitude = rows.abs()
    tied = magnitude >= magnitude.amax(-1, keepdim=True) * (1 - 1e-9)
    first = tied.to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(rows.gather(-1, first) < 0, -1.0, 1.0).to(rows.dtype)


def _pad(values: Float[Tensor, "heads n"], size: int) -> Float[Tensor, "heads size"]:
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))


def _pad_rows(rows: Float[Tensor, "heads n hidden"], size: int) -> Float[Tensor, "heads size hidden"]:
    return torch.nn.functional.pad(rows, (0, 0, 0, size - rows.shape[-2]))
