"""Sets of heads, their transforms, and all heads with all heads, against forms held whole in float64."""

import doctest
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headgram
from headgram.forms import transforms
from headgram.forms.circuits import ov, qk
from headgram.forms.heads import Heads
from headgram.forms.reading import Frame, Norm
from headgram.geometry import inner, routes
from headgram.geometry.inner import inner_products
from headgram.geometry.scores import layer_scores
from headgram.geometry.spectra import spectra
from headgram.geometry.triangles import triangles

pytestmark = pytest.mark.usefixtures("both_ways")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}


def dense(heads: Heads) -> np.ndarray:
    """Every form as a matrix, (n, d, d)."""
    a, b = heads.a.double().numpy()[heads.reads_a.numpy()], heads.b.double().numpy()[heads.reads_b.numpy()]
    return np.einsum("nrx,nry->nxy", a, b)


@st.composite
def sets(draw, width=None, dtype=None):
    """Heads of either circuit in some layers: shared factors, ranks beyond the width, zero heads."""
    layers, kv_heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4]))
    rank, width = draw(st.integers(1, 7)), width or draw(st.sampled_from([2, 3, 8, 17, 40]))
    dtype = dtype or draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    own, shared = (
        torch.randn(layers, n, rank, width, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-8, 8))
        for n in (4, kv_heads)
    )
    if draw(st.booleans()):
        own[0, 0] = 0
    own, shared = own.to(dtype), shared.to(dtype)
    return qk(own, shared) if draw(st.booleans()) else ov(shared, own)


@st.composite
def two_sets(draw):
    """Two sets of one width and one precision; the second may be the first, or some of its heads."""
    dtype, width = draw(st.sampled_from(list(TOLERANCE))), draw(st.sampled_from([2, 3, 8, 17, 40]))
    one = draw(sets(width=width, dtype=dtype))
    kind = draw(st.sampled_from(["same", "some", "other"]))
    if kind == "some":
        return one, one.take(draw(st.lists(st.integers(0, len(one) - 1), min_size=1, unique=True)))
    return one, one if kind == "same" else draw(sets(width=width, dtype=dtype))


def assert_products(found, x, y, tolerance):
    bound = tolerance * np.linalg.norm(x, axis=(1, 2))[:, None] * np.linalg.norm(y, axis=(1, 2))
    assert (np.abs(found.gram.numpy() - np.einsum("aij,bij->ab", x, y)) <= bound).all()
    assert (np.abs(found.transposed.numpy() - np.einsum("aij,bji->ab", x, y)) <= bound).all()


@settings(max_examples=40)
@given(two_sets(), st.sampled_from(["products", "strips"]), st.sampled_from(["auto", "float64"]), st.sampled_from([1, 2**30]))
def test_all_heads_with_all_heads(pair, route, precision, block_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "cheapest", lambda *_: route)
        for module, name in ((routes, "PRODUCT_BYTES"), (routes, "STRIP_BYTES"), (inner, "EXACT_BYTES")):
            patch.setattr(module, name, {"cpu": block_bytes})
        found = inner_products(*pair, precision)
    assert_products(found, *map(dense, pair), TOLERANCE[pair[0].a.dtype])


@pytest.mark.parametrize("route", ["products", "strips"])
@pytest.mark.parametrize("same", [True, False])
def test_many_heads(monkeypatch, route, same):
    """More heads than one row of the triangle, and a width that no block divides."""
    monkeypatch.setattr(inner, "cheapest", lambda *_: route)
    monkeypatch.setattr(routes, "STRIP_BYTES", {"cpu": 2**20})
    generator = torch.Generator().manual_seed(0)
    x = qk(torch.randn(40, 6, 4, 50, generator=generator), torch.randn(40, 2, 4, 50, generator=generator))
    y = x if same else x.take(slice(7, 211, 3))
    assert_products(inner_products(x, y), dense(x), dense(y), 1e-6)
    assert_products(inner_products(x, y, "float64"), dense(x), dense(y), 1e-12)


def cancelling(rank: int, width: int, part: float) -> Heads:
    """Forms that are smaller than those of random weights: the second half of a head's rows nearly takes the first away."""
    generator = torch.Generator().manual_seed(rank + width)
    a, b, more = (torch.randn(8, rank // 2, width, generator=generator) for _ in range(3))
    places = torch.arange(8)
    return Heads(torch.cat([a, a], 1), torch.cat([b, part * more - b], 1), places, places)


def spanned(rank: int, width: int) -> Heads:
    """Rows that are all multiples of one: forms of rank one, of which many are small."""
    generator = torch.Generator().manual_seed(rank * width)
    a, b = (torch.randn(8, 1, width, generator=generator) * torch.randn(8, rank, 1, generator=generator) for _ in range(2))
    return Heads(a, b, torch.arange(8), torch.arange(8))


def uneven(rank: int, width: int, columns: int, factor: float) -> Heads:
    """A few columns that outweigh all others."""
    generator = torch.Generator().manual_seed(rank + width)
    a, b = (torch.randn(8, rank, width, generator=generator) for _ in range(2))
    a[..., :columns] *= factor
    b[..., :columns] *= factor
    return Heads(a, b, torch.arange(8), torch.arange(8))


@pytest.mark.parametrize("route", ["products", "strips"])
@pytest.mark.parametrize(
    "x",
    [
        *(cancelling(rank, width, part) for rank in (2, 16) for width in (17, 160) for part in (0.2, 0.4, 0.7)),
        *(spanned(rank, width) for rank in (4, 16, 64) for width in (2, 64, 160)),
        *(uneven(rank, width, *how) for rank in (2, 64) for width in (64, 561) for how in ((1, 10), (2, 30), (1, 1000))),
    ],
    ids=lambda x: f"{x.rank} {x.widths[0]}",
)
def test_what_float32_would_round_away_is_measured_in_float64(monkeypatch, route, x):
    monkeypatch.setattr(inner, "cheapest", lambda *_: route)
    assert_products(inner_products(x, x), dense(x), dense(x), 1e-6)


def test_ordinary_weights_are_measured_in_float32():
    x = uneven(16, 160, 1, 3)
    assert not inner_products(x, x).exact_x.any()


@settings(max_examples=40)
@given(sets(), st.sampled_from(["products", "strips"]))
def test_compositions_are_inner_products_of_symmetric_forms(heads, route):
    """`<X^T X, Y Y^T> = ‖X Y‖²`."""
    x = dense(heads)
    expected = np.linalg.norm(np.einsum("aij,bjk->abik", x, x), axis=(2, 3)) ** 2
    reads, writes = right_gram(heads), right_gram(transforms.transposed(heads))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "cheapest", lambda *_: route)
        found = inner_products(reads, writes)
    norms = np.linalg.norm(x, axis=(1, 2)) ** 2
    assert (np.abs(found.gram.numpy() - expected) <= 1e-12 * norms[:, None] * norms).all()
    assert torch.equal(found.gram, found.transposed)


def right_gram(heads: Heads) -> Heads:
    """The forms `X^T X`, one factor each."""
    return Heads.symmetric(triangles(heads.a)[heads.reads_a] @ heads.right().double())


def size(heads: Heads) -> np.ndarray:
    """`‖A‖ ‖B‖` of every form, (n,)."""
    a, b = (np.linalg.norm(factors.double(), axis=(1, 2)) for factors in (heads.a, heads.b))
    return a[heads.reads_a.numpy()] * b[heads.reads_b.numpy()]


@settings(max_examples=40)
@given(sets())
def test_transforms_are_what_they_say(heads):
    x = dense(heads)
    expected = {
        "transposed": (transforms.transposed(heads), x.transpose(0, 2, 1), 1),
        "right gram": (right_gram(heads), np.einsum("nij,nik->njk", x, x), size(heads)),
        "orthonormal": (transforms.with_orthonormal_left(heads), x, 1),
    }
    for name, (found, truth, factor) in expected.items():
        error = np.abs(dense(found) - truth).max(axis=(1, 2))
        assert (error <= 1e-12 * np.maximum(size(heads), size(heads)[::-1]) * factor).all(), name


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("own_centred", [False, True])
def test_norms_are_folded_into_what_reads_through_them(centred, own_centred):
    """`diag(γ_q) C_q W diag(γ) C`, with matrices; the factors are heads 1 and 2 of three."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    gain, own = torch.linspace(-1, 2, 6, dtype=torch.float64), torch.linspace(0.5, 3, 12, dtype=torch.float64).view(3, 4)
    frame = Frame(norm=Norm(centred, gain), source_norm=Norm(not centred, gain.flip(0)), query_norm=Norm(own_centred, own))
    reads, crosses = (
        torch.diag(each) @ (torch.eye(6, dtype=torch.float64) - taken / 6)
        for each, taken in ((gain, centred), (gain.flip(0), not centred))
    )
    turns = torch.eye(4, dtype=torch.float64) - own_centred / 4
    expected = {
        "query": torch.diag_embed(own[1:]) @ turns @ factors @ reads,
        "key": factors @ crosses,
        "value": factors @ crosses,
        "output": factors,
    }
    for role, truth in expected.items():
        torch.testing.assert_close(transforms.folded(role, factors, frame, slice(1, 3)), truth, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(sets())
def test_spectra_of_either_circuit(heads):
    found, x = spectra(heads, 3), dense(heads)
    bound = 1e-12 * size(heads) * heads.rank
    expected = np.linalg.svd(x, compute_uv=False)[:, : heads.rank]
    values, right, left = (each.numpy() for each in (found.singular_values, found.right, found.left))
    assert (np.abs(values[:, : expected.shape[1]] - expected).max(1) <= bound).all()
    assert (np.abs(found.trace.numpy() - np.trace(x, axis1=1, axis2=2)) <= bound).all()
    mapped = np.einsum("nij,nkj->nki", x, right)
    assert (np.abs(mapped - values[:, : right.shape[1], None] * left).max((1, 2)) <= bound).all()
    first = np.take_along_axis(right, np.abs(right).argmax(2)[..., None], 2)
    assert (first >= 0).all()
    turned = spectra(transforms.transposed(heads), 3)
    torch.testing.assert_close(turned.directionality, -found.directionality, rtol=0, atol=1e-9)


def test_scores_of_a_layer_do_not_depend_on_which_side_is_shared():
    generator = torch.Generator().manual_seed(3)
    own, shared = torch.randn(4, 5, 30, generator=generator), torch.randn(2, 5, 30, generator=generator)
    own[..., 3] *= 40
    one, other = layer_scores(qk(own, shared)), layer_scores(ov(shared, own))
    assert one.symmetry_score == pytest.approx(other.symmetry_score, abs=1e-12)
    assert one.directionality == pytest.approx(-other.directionality, abs=1e-12)
    assert one.directionality > 0.1


def test_sets_refuse_what_does_not_fit():
    with pytest.raises(headgram.HeadgramError, match="do not fit together"):
        qk(torch.zeros(1, 3, 5), torch.zeros(1, 4, 5))
    with pytest.raises(headgram.HeadgramError, match="more value heads"):
        ov(torch.zeros(4, 3, 5), torch.zeros(2, 3, 5))
    square, other = qk(torch.ones(2, 3, 5), torch.ones(1, 3, 5)), qk(torch.ones(2, 3, 7), torch.ones(1, 3, 7))
    with pytest.raises(headgram.HeadgramError, match="of one width"):
        inner_products(square, other)
    with pytest.raises(headgram.HeadgramError, match="square forms"):
        spectra(ov(torch.ones(2, 3, 5), torch.ones(2, 3, 7)))


@pytest.mark.parametrize(
    "name",
    [
        "headgram.tensors",
        "headgram.forms.heads",
        *(f"headgram.geometry.{name}" for name in ("composition", "eigenvalues", "inner", "spectra")),
    ],
)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
