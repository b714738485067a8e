"""Overlaps of directions against their definition, and against random subspaces."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headgram.geometry import inner
from headgram.geometry.overlaps import overlaps


@st.composite
def directions(draw):
    """Orthonormal rows of some layers, some of them missing."""
    layers, hidden = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    kept = draw(st.integers(1, hidden))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.linalg.qr(torch.randn(layers, hidden, kept, generator=generator, dtype=torch.float64)).Q.mT.contiguous()
    for layer in range(layers):
        rows[layer, draw(st.integers(0, kept)) :] = 0
    return rows


@given(directions(), st.sampled_from([1, 4096, 2**27]))
def test_overlaps_agree_with_the_definition(rows, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "EXACT_BYTES", {"cpu": block})
        result = overlaps(rows[:, None])[..., 0].numpy()
    kept = rows.shape[1]
    for a, one in enumerate(rows.numpy()):
        for b, other in enumerate(rows.numpy()):
            assert result[a, b] == pytest.approx(np.linalg.norm(one @ other.T, "fro") ** 2 / kept, abs=1e-12)
        assert result[a, a] == pytest.approx(one.any(1).sum() / kept)  # the share of directions that it has
    np.testing.assert_array_equal(result, result.T)


@pytest.mark.parametrize(("kept", "hidden"), [(1, 10), (4, 25), (8, 64)])
def test_random_subspaces_overlap_by_k_over_d(kept, hidden):
    generator = torch.Generator().manual_seed(kept)
    rows = torch.linalg.qr(torch.randn(300, hidden, kept, generator=generator, dtype=torch.float64)).Q.mT
    measured = overlaps(rows[:, None].contiguous())[..., 0][~torch.eye(300, dtype=bool)]
    # Of 300 · 299 / 2 pairs; pairs that share a subspace are independent too, because rotations are.
    error = measured.std() / (300 * 299 / 2) ** 0.5
    assert abs(measured.mean() - kept / hidden) < 4 * error
    assert 4 * error < 0.03 * kept / hidden


def test_the_same_subspace_in_another_basis():
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(40, 8, generator=generator, dtype=torch.float64)).Q.T
    turned = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q @ rows
    assert overlaps(torch.stack([rows, turned])[:, None])[0, 1].item() == pytest.approx(1)
