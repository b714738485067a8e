"""Projection kernels against bases held whole, and against chance."""

import math

import pytest
import torch

from headgram.geometry.spans import kernels, spans

pytestmark = pytest.mark.usefixtures("both_ways")


@pytest.mark.parametrize("rank", [1, 5, 12, 17])
def test_kernels_are_their_definition_however_rows_depend_on_each_other(rank):
    generator = torch.Generator().manual_seed(rank)
    factors = torch.randn(6, rank, 12, generator=generator, dtype=torch.float64)
    factors[0] *= 10.0 ** torch.linspace(0, -9, rank, dtype=torch.float64)[:, None]
    factors[1, -1] = factors[1, 0]  # a row twice
    factors[2] = 0
    factors[3, 0] = 0
    exact = [min(rank, 12), max(1, min(rank - 1, 12)), 0, min(rank - 1, 12), *[min(rank, 12)] * 2]
    found = spans(factors)
    assert found.ranks.tolist() == exact
    bases = [
        torch.linalg.svd(each / each.norm(dim=1, keepdim=True).clamp_min(1e-300))[2][:k]
        for each, k in zip(factors, exact, strict=True)
    ]
    kernel, z = kernels(found, found)
    truth = torch.tensor([[(a @ b.T).square().sum() for b in bases] for a in bases], dtype=torch.float64)
    torch.testing.assert_close(kernel, truth, rtol=1e-5, atol=1e-6)
    assert z.isfinite().all()
    assert z[2].eq(0).all()


def test_chance_is_that_of_spans_turned_at_random():
    width, turns = 10, 4000
    generator = torch.Generator().manual_seed(0)
    one, other = spans(torch.randn(1, 3, width, generator=generator)), torch.randn(turns, 4, width, generator=generator)
    kernel, z = kernels(one, spans(other))
    assert abs(kernel.mean() - 3 * 4 / width) < 0.05
    assert abs(z.mean()) < 4 / math.sqrt(turns)
    assert abs(z.std() - 1) < 0.1
