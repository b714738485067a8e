"""Composition: how much of what one head writes another reads, after Elhage et al. (2021), for all pairs of heads at once.

    q   ‖g_b o_a‖_F     head a writes what the queries of head b read
    k   ‖o_a^T g_b‖_F   head a writes what the keys of head b read
    v   ‖o_b o_a‖_F     head a writes what head b moves on

The score `CS` is one of these norms, divided by the norms of both forms. It lies in `[0, 1]`. Each of the norms, squared, is an
inner product of two symmetric forms: of what `b` reads, `g^T g`, `g g^T` or `o^T o`, and of what `a` writes, `o o^T`. Divided by
their traces these have trace 1, so that

    CS² = <read_b, write_a>

which `headgram.geometry.inner` takes by the cheaper exact route. In float32 an inner product far below the product of the norms
would lose digits, so such pairs are multiplied again in float64: the relative error of every score is below 1e-5.

Under rotary encoding `g_b` depends on the offset between query and key. The mean over all offsets of `‖g_b(δ) o_a‖²`, over the
mean of `‖g_b(δ)‖²`, is such an inner product too: `g^T g = W_Q^T (W_K W_K^T) W_Q` has the mean of `W_K W_K^T` in the middle,
which keeps of every plane that turns the mean of its two rows.

If the reader is turned by a Haar-random rotation of the residual stream, `CS²` has

    mean        1/d
    variance    2 (p_a - 1/d) (p_b - 1/d) / ((d-1) (d+2))      p = Σσ⁴ / (Σσ²)²

exactly, whatever the spectra (Collins & Śniady, Comm. Math. Phys. 264, 2006). Trained heads share a few directions of the stream,
so nearly all pairs lie far from this. So a score is also compared with scores that mean nothing: those of `b` with heads of
later layers, whose output `b` cannot read. `acausal` is the share of these that the score exceeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgram.forms.heads import Heads, below, read
from headgram.forms.reading import Rotary
from headgram.forms.transforms import product, transposed, with_orthonormal_left
from headgram.geometry.blocks import FACTOR_BYTES, by_blocks
from headgram.geometry.eigenvalues import Eigenvalues, eigenvalues
from headgram.geometry.float32 import whole_float32
from headgram.geometry.inner import inner_products
from headgram.geometry.nulls import Moments
from headgram.geometry.ratios import ZERO, effective_rank, ratio
from headgram.geometry.spectra import signs
from headgram.geometry.triangles import own_products, triangles

#: What the later head does with what it reads, and the circuit whose forms say so.
KINDS = {"q": "qk", "k": "qk", "v": "ov"}

#: An inner product below this share of the norms' product is taken in float64.
_WEAK = 1e-3


@dataclass(frozen=True)
class Ends:
    """What heads read, or what they write: symmetric forms of trace 1 (of a zero head: 0).

    Attributes
    ----------
    forms
        `B_i^T B_i` with `‖B_i‖_F = 1`, in float32.
    purity : (n,)
        `p = ‖B_i^T B_i‖_F²`, between `1/r` for a flat spectrum and 1 for a single direction; float64.
    roots : (n, m, r)
        `L_i` of `B_i = L_i W[reads[i]]`; float64.
    weights : (some, r, d)
        `W` as it is stored.
    reads : (n,) int64, on the CPU
        The weight of each form.
    """

    forms: Heads
    purity: Float[Tensor, " n"]
    roots: Float[Tensor, "n m rank"]
    weights: Float[Tensor, "some rank width"]
    reads: Int[Tensor, " n"]

    def exact(self, heads: Int[Tensor, " k"]) -> Float[Tensor, "k m width"]:
        """`B_i` of some heads in float64."""
        return self.roots[heads] @ self.weights[self.reads[heads.cpu()].to(self.weights.device)].double()

    @property
    def moments(self) -> Moments:
        """What the null of a score's square follows from; on the CPU."""
        purity = self.purity.cpu()
        return Moments((purity > 0).to(purity), purity)


@torch.no_grad()
def reads(kind: str, heads: Heads, rotary: Rotary | None = None) -> Ends:
    """What heads read in a composition of one of `KINDS`, from their forms of the circuit that it names.

    Parameters
    ----------
    rotary
        How the layer of these heads turns queries and keys: what is read is then the mean over all offsets between them.
    """
    return _ends(transposed(heads) if kind == "k" else heads, rotary)


@torch.no_grad()
def writes(ov: Heads) -> Ends:
    """What heads write, from their forms of the circuit `ov`."""
    return _ends(transposed(ov))


def joined(parts: Sequence[Ends]) -> Ends:
    """The ends of several sets of heads, one after the other."""
    if len(parts) == 1:
        return parts[0]
    weights = list({id(part.weights): part.weights for part in parts}.values())  # parts of one set share theirs
    starts = {id(each): start for each, start in zip(weights, accumulate(map(len, weights), initial=0), strict=False)}
    return Ends(
        Heads.symmetric(below([part.forms.a for part in parts])),
        torch.cat([part.purity for part in parts]),
        below([part.roots for part in parts]),
        torch.cat(weights) if len(weights) > 1 else weights[0],
        torch.cat([part.reads + starts[id(part.weights)] for part in parts]),
    )


@whole_float32()
def _ends(heads: Heads, rotary: Rotary | None = None) -> Ends:
    """`X^T X` of every form `X = A^T B`, or its mean over offsets: from factors `L B`, where `L^T L` is `A A^T`, or its mean."""

    def measure(block: slice) -> Ends:
        some = heads.take(block)
        roots = triangles(some.a) if rotary is None else _mean_roots(rotary.scaled(some.a), rotary)
        b = some.b.double()
        roots = roots[some.reads_a.to(heads.device)]
        small = roots @ own_products(b)[some.reads_b.to(heads.device)] @ roots.mT
        trace = small.diagonal(dim1=1, dim2=2).sum(-1)
        unit = ratio(torch.ones_like(trace), trace.sqrt())
        roots = unit[:, None, None] * roots
        forms = Heads.symmetric(roots.float() @ read(some.b.float(), some.reads_b))
        return Ends(forms, small.square().sum((-1, -2)) * unit**4, roots, heads.b, heads.reads_b[block])

    step = max(1, FACTOR_BYTES[heads.device.type] // (8 * heads.rank * max(heads.widths)))
    return joined(list(by_blocks(range(len(heads)), step, measure)))


def _mean_roots(factors: Float[Tensor, "n rank width"], rotary: Rotary) -> Float[Tensor, "n rank rank"]:
    """`L` with `L^T L` the mean of `R^T A A^T R` over all rotations `R` of rows, float64.

    The mean keeps only products of rows that turn with one frequency. Within a plane, that is the mean of its two rows. Across
    planes of equal frequency, it is the products that turn together. Rows that do not turn stay as they are.
    """
    gram = factors @ factors.mT
    rotary = rotary.to(gram.device)
    (first, second), frequencies = rotary.rows, rotary.frequencies
    turns = frequencies != 0
    first, second, frequencies = first[turns], second[turns], frequencies[turns]
    still = torch.ones(gram.shape[-1], dtype=torch.bool, device=gram.device)
    still[torch.cat([first, second])] = False
    mean = gram * (still[:, None] & still)
    together = frequencies[:, None] == frequencies

    def part(rows: Tensor, columns: Tensor) -> Tensor:
        return gram[:, rows[:, None], columns] * together

    even = (part(first, first) + part(second, second)) / 2
    odd = (part(first, second) - part(second, first)) / 2
    for rows, columns, values in ((first, first, even), (second, second, even), (first, second, odd), (second, first, -odd)):
        mean[:, rows[:, None], columns] = values
    values, vectors = torch.linalg.eigh((mean + mean.mT) / 2)
    roots: Tensor = values.clamp_min(0).sqrt()[:, :, None] * vectors.mT
    return roots


@torch.no_grad()
def scores(readers: Ends, writers: Ends) -> Float[Tensor, "readers writers"]:
    """The score of every reader with every writer, wherever their layers; float64, on the device of the forms.

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import ov, qk
    >>> from headgram.geometry.composition import reads, scores, writes
    >>> weights = [torch.randn(2, 3, 4, 16) for _ in range(4)]  # two layers of three heads
    >>> scores(reads("k", qk(*weights[:2])), writes(ov(*weights[2:]))).shape
    torch.Size([6, 6])
    """
    squares = inner_products(readers.forms, writers.forms, norms_sq=(readers.purity, writers.purity)).gram
    weak = squares < _WEAK * (readers.purity[:, None] * writers.purity).sqrt()
    step = max(1, FACTOR_BYTES[squares.device.type] // (8 * (readers.forms.a[0].numel() + writers.forms.a[0].numel())))
    for i, j in (some.T for some in weak.nonzero().split(step)):
        squares[i, j] = (readers.exact(i) @ writers.exact(j).mT).square().sum((-1, -2))
    return squares.sqrt().clamp(max=1)


def times_chance(score: Float[Tensor, "*pairs"], width: int) -> Float[Tensor, "*pairs"]:
    """`CS · √d`: 1 is what a random orientation gives, in the mean of the squares."""
    return score * math.sqrt(width)


def acausal(
    score: Float[Tensor, "readers writers"], reader_layer: Int[Tensor, " readers"], writer_layer: Int[Tensor, " writers"]
) -> tuple[Float[Tensor, "readers writers"], Int[Tensor, " readers"]]:
    """The share of a reader's scores with writers of later layers that each of its scores exceeds, equal ones half.

    Returns
    -------
    share : (readers, writers)
        In `[0, 1]`; 0 where no layer is later.
    later : (readers,)
        How many scores with later writers there are.
    """
    share = torch.zeros_like(score)
    later = torch.zeros(len(score), dtype=torch.int64)
    for layer in reader_layer.unique().tolist():
        rows, columns = (reader_layer == layer).nonzero().flatten(), (writer_layer > layer).nonzero().flatten()
        if not len(columns):
            continue
        own = score[rows].contiguous()
        others = own[:, columns].sort(dim=1).values
        below, upto = (torch.searchsorted(others, own, right=right) for right in (False, True))
        share[rows] = (below + upto).double() / (2 * len(columns))
        later[rows] = len(columns)
    return share, later


@dataclass(frozen=True)
class Channels:
    """What flows through `n` pairs of heads: singular values, directions and eigenvalues of the composed forms; float64.

    Attributes
    ----------
    singular_values : (n, r)
        Of the forms `g_b o_a`, `o_a^T g_b` or `o_b o_a`: few large ones are a channel, many of one size a diffuse overlap.
    right, left : (n, k, d)
        `X v = s u` for the `k` largest; zero rows where a singular value is zero.
    eigenvalues
        Of the same forms. Of `k`, positive ones mean that head b looks for tokens that follow one like its own: induction.
        None of forms from one stream to another.
    carried : (n, k, d)
        For each of the top directions, what head a writes of it into the stream, of unit length.
    """

    singular_values: Float[Tensor, "n rank"]
    right: Float[Tensor, "n k width"]
    left: Float[Tensor, "n k width"]
    eigenvalues: Eigenvalues | None
    carried: Float[Tensor, "n k width"]

    @property
    def first(self) -> Float[Tensor, " n"]:
        """The share of the energy in the largest singular value."""
        energy = self.singular_values.square()
        return ratio(energy[:, 0], energy.sum(-1))

    @property
    def effective_rank(self) -> Float[Tensor, " n"]:
        """The exponential of the entropy of the shares of energy; 0 of a zero form."""
        return effective_rank(self.singular_values)


def composed(kind: str, ov_a: Heads, forms_b: Heads) -> Heads:
    """The composed forms of pairs of heads, the first of `a` with the first of `b` and so on; see the top of the module."""
    return product(transposed(ov_a), forms_b) if kind == "k" else product(forms_b, ov_a)


@torch.no_grad()
def channels(kind: str, ov_a: Heads, forms_b: Heads, topk: int, within: bool = True) -> Channels:
    """What flows through pairs of heads, the first of `a` with the first of `b` and so on.

    Parameters
    ----------
    kind
        One of `KINDS`.
    ov_a
        What the earlier heads move.
    forms_b
        The forms of the later heads, of the circuit that the kind names.
    topk
        How many directions to keep.
    within
        Whether both heads read and write one stream. An encoder's head and one of cross-attention do not.
    """
    forms = composed(kind, ov_a, forms_b)
    exact = with_orthonormal_left(forms)
    basis, upper = torch.linalg.qr(exact.b.mT)  # X = U_a (R B) = U_a (upper^T basis^T)
    u, s, v = torch.linalg.svd(upper.mT, full_matrices=False)
    unit = (forms.a.norm(dim=-1) * forms.b.norm(dim=-1)).sum(-1, keepdim=True)
    s = s.where(s > ZERO * unit, 0)
    kept = min(topk, forms.rank)
    left, right = u[:, :, :kept].mT @ exact.left(), v[:, :kept] @ basis.mT
    sign = signs(right) * (s[:, :kept, None] > 0)
    left, right = left * sign, right * sign
    source = left if kind == "k" else right  # what head a reads
    written = source @ ov_a.right().double().mT @ ov_a.left().double()
    return Channels(
        torch.nn.functional.pad(s, (0, forms.rank - s.shape[-1])),
        right,
        left,
        eigenvalues(forms) if within else None,
        ratio(written, written.norm(dim=-1, keepdim=True)),
    )
