"""Symmetry and directionality scores against their definition, on forms held whole."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headgram
from headgram.forms.circuits import qk
from headgram.geometry import scores
from headgram.geometry.scores import layer_scores, symmetry_score

pytestmark = pytest.mark.usefixtures("both_ways")


@st.composite
def layers(draw):
    """Query and key weights of one layer: grouped keys, ranks beyond the width, zero heads, outstanding columns."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    rank, hidden = draw(st.integers(1, 12)), draw(st.integers(1, 48))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, k = (
        torch.randn(n, rank, hidden, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-12, 12))
        for n in (4, kv_heads)
    )
    for weights in (q, k):
        spread = draw(st.sampled_from([0, 1, 3]))
        weights.mul_(torch.exp(spread * torch.randn(hidden, generator=generator, dtype=torch.float64)))
        if draw(st.booleans()):
            weights[0] = 0
    return q, k


def directionality(q, k):
    return headgram.spectrum(q, k).directionality


def form(q, k, head):
    return k[head * len(k) // len(q)].numpy().T @ q[head].numpy()


def defined(g):
    """The paper's two scores of its `W_qk = g^T`, and how near a norm comes to its threshold."""
    w_qk = g.T
    if not w_qk.any():
        return 0.0, 0.0, 1.0
    symmetric, antisymmetric = (w_qk + w_qk.T) / 2, (w_qk - w_qk.T) / 2
    symmetry = ((symmetric**2).sum() - (antisymmetric**2).sum()) / (w_qk**2).sum()
    totals, margins = [], []
    for norms in (np.linalg.norm(w_qk, axis=1), np.linalg.norm(w_qk, axis=0)):  # rows, columns
        deviation = norms.std(ddof=1) if len(norms) > 1 else 0.0
        threshold = norms.mean() + 2 * deviation
        margins.append(np.abs(norms - threshold).min() / threshold if deviation > 1e-9 * threshold else 1.0)
        totals.append(norms[norms > threshold * (1 + 1e-9)].sum())
    rows, columns = totals
    return symmetry, (rows - columns) / (rows + columns) if rows + columns else 0.0, min(margins)


@given(layers())
def test_heads_agree_with_the_definition(layer):
    q, k = layer
    result = headgram.spectrum(q, k)
    symmetry, direction = symmetry_score(result.fro_sq, result.self_overlap), result.directionality
    for head in range(len(q)):
        expected, expected_direction, margin = defined(form(q, k, head))
        assert symmetry[head] == pytest.approx(expected, abs=1e-9)
        if margin > 1e-8:
            assert direction[head] == pytest.approx(expected_direction, abs=1e-9)


@given(layers(), st.sampled_from([3, 17, 2048]))
def test_layers_agree_with_the_definition(layer, block):
    q, k = layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "BLOCK", {"cpu": block})
        result = layer_scores(qk(q, k))
    symmetry, direction, margin = defined(sum(form(q, k, head) for head in range(len(q))))
    assert result.symmetry_score == pytest.approx(symmetry, abs=1e-9)
    if margin > 1e-8:
        assert result.directionality == pytest.approx(direction, abs=1e-9)


@given(layers())
def test_exchanging_the_sides_changes_the_sign(layer):
    q, k = layer
    k = k.repeat_interleave(len(q) // len(k), 0)
    torch.testing.assert_close(directionality(q, k), -directionality(k, q), rtol=0, atol=1e-9)
    one, other = layer_scores(qk(q, k)), layer_scores(qk(k, q))
    assert one.directionality == pytest.approx(-other.directionality, abs=1e-9)
    assert one.symmetry_score == pytest.approx(other.symmetry_score, abs=1e-9)


def test_known_forms():
    """One large column of keys is -1, of queries 1; equal norms favour no side; a sum of heads may be what none of them is."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.eye(60, dtype=torch.float64)[None]
    signs = torch.randn(1, 60, 60, generator=generator, dtype=torch.float64).sign()
    signs[..., 3] *= 100
    assert directionality(plain, signs).tolist() == [-1]
    assert directionality(signs, plain).tolist() == [1]
    assert layer_scores(qk(plain, signs)).directionality == -1
    q, k = (torch.randn(1, 64, 200, generator=generator, dtype=torch.float64) for _ in range(2))
    identity = torch.eye(50, dtype=torch.float64)[None] * 0.1
    assert directionality(identity, identity).item() == 0
    assert layer_scores(qk(identity, identity)) == (1, 0)
    heads = torch.cat([q, k]), torch.cat([k, q])  # g + g^T
    assert layer_scores(qk(*heads)).symmetry_score == pytest.approx(1)
    opposite = torch.cat([q, -q]), torch.cat([k, k])  # g - g
    assert layer_scores(qk(*opposite)) == (0, 0)


def test_a_form_that_cancels_is_zero():
    """Products of such weights leave a trace of rounding, which has no direction."""
    q = torch.randn(1, 1, 30, dtype=torch.float64).repeat(1, 2, 1)
    k = torch.randn(1, 1, 30, dtype=torch.float64).repeat(1, 2, 1) * torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    assert directionality(q, k).tolist() == [0]


def test_memory_is_bounded_for_many_small_blocks(monkeypatch):
    """However wide a model is: columns taken a few at a time give what all give at once."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(n, 6, 90, generator=generator) for n in (8, 2))
    whole = layer_scores(qk(q, k))
    monkeypatch.setattr(scores, "BLOCK", {"cpu": 7})
    for columns in (1, 20):
        monkeypatch.setattr(scores, "BLOCK_BYTES", columns * 8 * 4 * 2 * 6)
        assert layer_scores(qk(q, k)) == pytest.approx(whole, abs=1e-12)
