"""Spectra against the definition: `g` formed in float64, NumPy's own decompositions."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headgram

pytestmark = pytest.mark.usefixtures("both_ways")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}


@st.composite
def layers(draw):
    """Query and key weights of one layer, with every degeneracy that mathematics allows."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = draw(st.sampled_from([4, 8])) if kv_heads < 4 else 4
    rank, hidden = draw(st.integers(1, 12)), draw(st.integers(2, 40))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = [10.0 ** draw(st.integers(-12, 12)) for _ in range(2)]
    q, k = (
        torch.randn(n, rank, hidden, generator=generator, dtype=torch.float64) * scale
        for n, scale in zip((heads, kv_heads), scales, strict=True)
    )
    for flaw in draw(st.sets(st.sampled_from(["zero query", "zero key", "equal rows", "symmetric", "low rank"]))):
        if flaw == "zero query":
            q[0] = 0
        elif flaw == "zero key":
            k[-1] = 0
        elif flaw == "equal rows":
            q[1] = q[1, :1]
        elif flaw == "symmetric" and heads == kv_heads:
            k[2] = q[2]
        elif flaw == "low rank" and rank > 1:
            k[0, 1:] = 0
    return q.to(dtype), k.to(dtype)


def form(q, k, head):
    """The metric of one head, formed in float64."""
    return k[head * len(k) // len(q)].double().numpy().T @ q[head].double().numpy()


def padded(values, size):
    return np.pad(values, (0, max(0, size - len(values))))[:size]


@given(layers())
def test_values_agree_with_the_definition(layer):
    q, k = layer
    result = headgram.spectrum(q, k)
    tolerance = TOLERANCE[q.dtype]
    for head in range(len(q)):
        g = form(q, k, head)
        s = padded(np.linalg.svd(g, compute_uv=False), q.shape[1])
        eigenvalues = np.linalg.eigvalsh((g + g.T) / 2)
        nonzero = eigenvalues[np.argsort(-np.abs(eigenvalues), kind="stable")]
        scale = s[0] or 1.0
        np.testing.assert_allclose(result.singular_values[head], s, atol=tolerance * scale, rtol=0)
        measured = np.sort(result.symmetric_eigenvalues[head].numpy())
        np.testing.assert_allclose(measured, np.sort(padded(nonzero, 2 * q.shape[1])), atol=tolerance * scale, rtol=0)
        np.testing.assert_allclose(result.fro_sq[head], (g**2).sum(), rtol=max(tolerance, 1e-12), atol=0)
        np.testing.assert_allclose(result.trace[head], np.trace(g), atol=tolerance * np.linalg.norm(g), rtol=0)
        np.testing.assert_allclose(result.self_overlap[head], np.trace(g @ g), atol=tolerance * (g**2).sum(), rtol=0)


@given(layers())
def test_directions_are_what_g_maps(layer):
    q, k = layer
    result = headgram.spectrum(q, k, topk=5)
    for head in range(len(q)):
        g = form(q, k, head)
        scale = np.linalg.norm(g) or 1.0
        right, left, signed = (rows[head].numpy() for rows in (result.right, result.left, result.signed))
        s, eigenvalues = result.singular_values[head, :5, None].numpy(), result.symmetric_eigenvalues[head, :5, None].numpy()
        np.testing.assert_allclose(g @ right.T, (s[: len(right)] * left).T, atol=1e-11 * scale)
        np.testing.assert_allclose((g + g.T) @ signed.T / 2, (eigenvalues[: len(signed)] * signed).T, atol=1e-11 * scale)
        for rows, values in ((right, s), (left, s), (signed, eigenvalues)):
            present = (values[: len(rows), 0] != 0).astype(float)
            np.testing.assert_allclose(rows @ rows.T, np.diag(present), atol=1e-10)


@given(layers())
def test_scalars_are_finite_and_in_range(layer):
    result = headgram.spectrum(*layer)
    alive = result.singular_values[:, 0] > 0
    rank = layer[0].shape[1]
    for name in ("stable_rank", "effective_rank"):
        value = getattr(result, name)
        assert ((value >= 1 - 1e-9) & (value <= rank + 1e-9))[alive].all()
        assert (value[~alive] == 0).all()
    for name in ("symmetry", "positive_energy"):
        value = getattr(result, name)
        assert ((value >= 0) & (value <= 1)).all()
        assert (value[~alive] == 0).all()
    assert (result.residual < 1e-12).all()
    assert (result.nuclear_norm >= result.spectral_norm).all()


@given(st.integers(0, 2**31), st.sampled_from([3, 6, 12]), st.sampled_from(list(TOLERANCE)))
def test_rows_of_opposite_scales(seed, decades, dtype):
    """`g` only sees products of a query row and its key row; the rows themselves may differ by any factor."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 8, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    scales = 10.0 ** torch.linspace(-decades, decades, 8, dtype=torch.float64)[:, None]
    test_values_agree_with_the_definition.hypothesis.inner_test(((q * scales).to(dtype), (k / scales).to(dtype)))


@given(st.integers(0, 2**31))
def test_forms_much_smaller_than_their_weights(seed):
    """Queries and keys nearly orthogonal in the space of the rank: what is left of `g` is exact all the same."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    q, k = (half @ torch.randn(8, 64, generator=generator, dtype=torch.float64) for half in (basis[:, :8], basis[:, 8:]))
    q, k = q.float()[None], k.float()[None]
    test_values_agree_with_the_definition.hypothesis.inner_test((q, k))
    g = form(q, k, 0)
    gram = headgram.gram(q[None], k[None], q[None], k[None])
    np.testing.assert_allclose(gram.item(), (g**2).sum(), rtol=1e-6)


def test_tiny_weights_are_not_zero():
    q, k = (torch.randn(1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    small, usual = headgram.spectrum(q * 1e-120, k * 1e-120), headgram.spectrum(q, k)
    np.testing.assert_allclose(small.singular_values * 1e240, usual.singular_values, rtol=1e-12)
    np.testing.assert_allclose(small.symmetry, usual.symmetry, rtol=1e-12)
    assert float(small.stable_rank) == pytest.approx(float(usual.stable_rank))


@given(layers())
def test_order_and_signs_are_fixed(layer):
    result = headgram.spectrum(*layer)
    assert (result.singular_values.diff(dim=1) <= 0).all()
    magnitude = result.symmetric_eigenvalues.abs()
    assert (magnitude.diff(dim=1) <= 2e-12 * magnitude[:, :1]).all()
    for rows in (result.right, result.signed):
        largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        assert (largest >= -1e-9).all()


def test_opposite_eigenvalues_come_positive_first():
    q = torch.zeros(1, 1, 4, dtype=torch.float64)
    k = torch.zeros(1, 1, 4, dtype=torch.float64)
    q[0, 0, 0], k[0, 0, 1] = 3.0, 5.0  # g = 15 e_1 e_0^T: nilpotent, its symmetric part has the eigenvalues ±7.5
    assert headgram.spectrum(q, k).symmetric_eigenvalues.tolist() == [[pytest.approx(7.5), pytest.approx(-7.5)]]


def test_known_symmetric_and_antisymmetric_forms():
    q = torch.eye(2, dtype=torch.float64)[None].repeat(2, 1, 1)
    k = torch.stack([torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)])
    result = headgram.spectrum(q, k)
    assert result.symmetry.tolist() == pytest.approx([1.0, 0.0])
    assert result.positive_energy.tolist() == [1.0, 0.0]
    assert result.stable_rank.tolist() == pytest.approx([2.0, 2.0])
    assert result.effective_rank.tolist() == pytest.approx([2.0, 2.0])


def test_heads_do_not_depend_on_their_batch(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(6, 8, 40, generator=generator), torch.randn(2, 8, 40, generator=generator)
    whole = headgram.spectrum(q, k)
    monkeypatch.setattr("headgram.geometry.spectra.SPECTRA_BYTES", {"cpu": 1})
    single = headgram.spectrum(q, k)
    for name in vars(whole):
        assert torch.equal(getattr(whole, name), getattr(single, name)), name


@pytest.mark.parametrize(
    ("q", "k", "topk", "words"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), 8, "do not fit together"),
        (torch.zeros(2, 3, 4), torch.zeros(4, 3, 4), 8, "more key heads"),
        (torch.full((1, 1, 1), torch.nan), torch.zeros(1, 1, 1), 8, "NaN"),
        (torch.zeros(1, 1, 1), torch.full((1, 1, 1), torch.inf), 8, "infinity"),
        (torch.full((1, 1, 1), 1e200, dtype=torch.float64), torch.full((1, 1, 1), 1e200, dtype=torch.float64), 8, "overflows"),
        (torch.zeros(1, 1, 1, dtype=torch.int8), torch.zeros(1, 1, 1), 8, "not floating point"),
        (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 0, "at least one"),
    ],
)
def test_bad_weights_are_refused(q, k, topk, words):
    with pytest.raises(headgram.HeadgramError, match=words):
        inspect.unwrap(headgram.spectrum)(q, k, topk)  # as users run it: without the tests' own check of shapes


def test_parameters_of_a_model_carry_no_graph_into_the_result():
    q, k = (torch.nn.Parameter(torch.randn(2, 3, 8)) for _ in range(2))
    assert not headgram.spectrum(q, k).singular_values.requires_grad
    assert not headgram.gram(q[None], k[None], q[None], k[None]).requires_grad
