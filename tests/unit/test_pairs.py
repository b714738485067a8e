"""Inner products against the definition."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headgram

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}


@st.composite
def runs(draw):
    """Two runs of layers."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    rank, hidden = draw(st.integers(1, 8)), draw(st.integers(2, 24))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weights = []
    for n in (draw(st.integers(1, 4)), draw(st.integers(1, 4))):
        scale = 10.0 ** draw(st.integers(-12, 12))
        for count in (4, kv_heads):
            weight = torch.randn(n, count, rank, hidden, generator=generator, dtype=torch.float64) * scale
            if draw(st.booleans()):
                weight[0, 0] = 0
            weights.append(weight.to(dtype))
    return weights


def forms(w_q, w_k):
    w_k = w_k.double().numpy()[:, np.arange(w_q.shape[1]) * w_k.shape[1] // w_q.shape[1]]
    return np.einsum("lhrx,lhry->lhxy", w_k, w_q.double().numpy())


@given(runs())
def test_gram_agrees_with_the_definition(weights):
    g_a, g_b = forms(*weights[:2]), forms(*weights[2:])
    expected = np.einsum("ahxy,bhxy->abh", g_a, g_b)
    bound = np.einsum("ah,bh->abh", *(np.sqrt((g**2).sum((2, 3))) for g in (g_a, g_b)))
    measured = headgram.gram(*weights)
    assert measured.dtype == torch.float64
    assert (np.abs(measured.numpy() - expected) <= TOLERANCE[weights[0].dtype] * bound).all()


def test_diagonal_is_fro_sq_and_blocks_do_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    w_q, w_k = torch.randn(5, 6, 8, 32, generator=generator), torch.randn(5, 3, 8, 32, generator=generator)
    gram = headgram.gram(w_q, w_k, w_q, w_k)
    for layer in range(5):
        np.testing.assert_allclose(gram[layer, layer], headgram.spectrum(w_q[layer], w_k[layer]).fro_sq, rtol=1e-13)
    torch.testing.assert_close(gram, gram.transpose(0, 1), rtol=1e-13, atol=1e-10)
    monkeypatch.setattr("headgram.geometry.pairs.BLOCK_BYTES", 1)
    torch.testing.assert_close(headgram.gram(w_q, w_k, w_q, w_k), gram, rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 4, 3, 6), (2, 4, 3), (2, 3, 3, 5), (0, 4, 3, 5)])
def test_shapes_must_fit(shape):
    good_q, good_k = torch.zeros(2, 4, 3, 5), torch.zeros(2, 2, 3, 5)
    with pytest.raises(headgram.HeadgramError):
        inspect.unwrap(headgram.gram)(torch.zeros(shape), good_k, good_q, good_k)  # without the tests' own check of shapes
