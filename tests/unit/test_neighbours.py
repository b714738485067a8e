"""Nearest heads, overlaps of spans and their nulls, against definitions and simulation."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headgram.geometry import neighbours
from headgram.geometry.neighbours import nearest_heads, span_overlaps
from headgram.geometry.nulls import cosine_null, overlap_null


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 99), st.integers(1, 5))
def test_the_nearest_heads_are_those_of_largest_magnitude(heads, count, seed, rows):
    random = np.random.default_rng(seed)
    values = random.integers(-3, 4, (heads, heads)) / 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_ROWS", rows)
        found = nearest_heads(torch.tensor(values, dtype=torch.float32), count)
    for head in range(heads):
        others = [other for other in range(heads) if other != head]
        expected = sorted(others, key=lambda other, head=head: (-abs(values[head, other]), other))[:count]
        assert found.place[head].tolist() == expected
        np.testing.assert_allclose(found.value[head], values[head, expected], rtol=1e-6)


def test_finding_the_nearest_of_many_heads_takes_little_beside_their_matrix():
    """The matrix of 8,192 heads takes 256 MiB, and their sorted indices would take 512 MiB."""
    code = """
import resource, torch
from headgram.geometry.neighbours import nearest_heads
nearest_heads(torch.rand(512, 512), 8)
values = torch.rand(8192, 8192)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_heads(values, 8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400  # what is freed need not be given back at once


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99), st.sampled_from([1, 2**20]))
def test_overlaps_of_all_spans_agree_with_the_definition(layers, heads, kept, seed, block):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(layers, heads, 12, kept, generator=generator)).Q.mT.contiguous()
    directions[0, 0, kept // 2 :] = 0  # of a form of a lower rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_BLOCK_BYTES", block)
        found = span_overlaps(directions)
    flat = directions.flatten(0, 1).double().numpy()
    expected = (np.einsum("aix,bjx->abij", flat, flat) ** 2).sum((2, 3)) / kept
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize(("kept", "width"), [(1, 5), (2, 6), (5, 6), (6, 6)])
def test_overlaps_of_randomly_turned_spans(kept, width):
    turned = scipy.stats.ortho_group.rvs(width, size=6000, random_state=0)[:, :kept]
    overlaps = (turned[:, :, :kept] ** 2).sum((1, 2)) / kept
    null = overlap_null(kept, width)
    assert overlaps.mean() == pytest.approx(null.mean, abs=5 * null.deviation / np.sqrt(6000) + 1e-12)
    assert overlaps.std() == pytest.approx(null.deviation, rel=0.05, abs=1e-12)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("count", [8, 269])
def test_the_best_of_many_normal_values(two_sided, count):
    values = np.random.default_rng(1).standard_normal((4000, count))
    best = (np.abs(values) if two_sided else values).max(1)
    null = cosine_null(1) if two_sided else overlap_null(1, 3)
    assert (null.best_of(count) - null.mean) / null.deviation == pytest.approx(best.mean(), rel=0.02)
