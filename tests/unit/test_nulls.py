"""What chance gives, against random weights."""

import math
from dataclasses import astuple

import numpy as np
import pytest

from headgram.geometry.nulls import Null, cosine_null, overlap_null, part_cosine_null, symmetry_null, symmetry_score_null
from headgram.report.chance import for_page

COUNT = 4000


def forms(rank: int, width: int, seed: int) -> np.ndarray:
    """Forms of independent random factors."""
    random = np.random.default_rng(seed)
    return np.einsum("nrk,nrq->nkq", *random.standard_normal((2, COUNT, rank, width)))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nij,nij->n", a, b) / np.linalg.norm(a, axis=(1, 2)) / np.linalg.norm(b, axis=(1, 2))


@pytest.mark.parametrize(("rank", "width"), [(2, 24), (8, 24), (24, 24)])
def test_random_forms(rank, width):
    a, b = forms(rank, width, 0), forms(rank, width, 1)
    even, odd = ([(form + sign * form.mT) / 2 for form in (a, b)] for sign in (1, -1))
    symmetry = np.linalg.norm(even[0], axis=(1, 2)) ** 2 / np.linalg.norm(a, axis=(1, 2)) ** 2
    for values, null in (
        (symmetry, symmetry_null(width)),
        (2 * symmetry - 1, symmetry_score_null(width)),
        (cosines(a, b), cosine_null(width)),
        (cosines(a, b.mT), cosine_null(width)),
        (cosines(*even), part_cosine_null(width)),
        (cosines(*odd), part_cosine_null(width)),
        (cosines(a, b).reshape(-1, 8).mean(1), cosine_null(width).mean_of(8)),
    ):
        assert values.mean() == pytest.approx(null.mean, abs=5 * null.deviation / math.sqrt(len(values)))
        assert values.std() == pytest.approx(null.deviation, rel=0.12)  # of a low rank, a little less


@pytest.mark.parametrize(("kept", "width"), [(1, 12), (4, 24), (20, 24)])
def test_random_subspaces(kept, width):
    random = np.random.default_rng(2)
    a, b = (np.linalg.qr(random.standard_normal((COUNT, width, kept)))[0] for _ in range(2))
    values = np.square(np.einsum("nwi,nwj->nij", a, b)).sum((1, 2)) / kept
    null = overlap_null(kept, width)
    assert values.mean() == pytest.approx(null.mean, abs=5 * null.deviation / math.sqrt(COUNT))
    assert values.std() == pytest.approx(null.deviation, rel=0.12)


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_the_best_of_many_random_forms(count):
    """Symmetries and cosines of forms are normal enough that the expected extreme of normal values tells their best."""
    rank, width = 16, 96
    q_a, k_a, q_b, k_b = np.random.default_rng(3).standard_normal((4, 5 * COUNT, rank, width), dtype=np.float32)

    def products(q, k, q_other, k_other):
        """`<k^T q, k_other^T q_other>`, without the forms."""
        return ((k @ k_other.mT) * (q @ q_other.mT)).sum((1, 2))

    norms_sq = products(q_a, k_a, q_a, k_a)
    cosine = products(q_a, k_a, q_b, k_b) / np.sqrt(norms_sq * products(q_b, k_b, q_b, k_b))
    symmetry = 0.5 + 0.5 * products(q_a, k_a, k_a, q_a) / norms_sq
    for values, null in ((np.abs(cosine), cosine_null(width)), (symmetry, Null(*astuple(symmetry_null(width))[:2]))):
        best = values[: len(values) // count * count].reshape(-1, count).max(1)
        found, said = ((each - null.mean) / null.deviation for each in (best.mean(), null.best_of(count)))
        assert found == pytest.approx(said, rel=0.04, abs=float(4 * best.std()) / null.deviation / math.sqrt(len(best)))


def test_the_page_knows_the_best_of_all():
    found = for_page({"hidden": 24, "directions": 4, "layers": 5, "heads": 8})
    assert found["symmetry"] == {
        "mean": 0.5 + 1 / 48,
        "deviation": math.sqrt(2) / 48,
        "best": pytest.approx(symmetry_null(24).best_of(40) - symmetry_null(24).mean),
        "best_mean": pytest.approx(symmetry_null(24).mean_of(8).best_of(10) - symmetry_null(24).mean),
        "best_pair": pytest.approx(symmetry_null(24).best_of(780) - symmetry_null(24).mean),
    }
    assert found["cosine"]["best"] == pytest.approx(cosine_null(24).best_of(80))
    assert found["right"]["mean"] == 4 / 24
