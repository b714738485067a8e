"""What chance gives, against random weights."""

import math

import numpy as np
import pytest

from headgram.geometry.nulls import cosine_null, part_cosine_null, symmetry_null, symmetry_score_null
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


def test_the_page_knows_the_best_of_all():
    found = for_page({"hidden": 24, "directions": 4, "layers": 5, "heads": 8})
    assert found["symmetry"] == {
        "mean": 0.5 + 1 / 48,
        "deviation": math.sqrt(2) / 48,
        "best": pytest.approx(symmetry_null(24).best_of(40) - symmetry_null(24).mean),
        "best_mean": pytest.approx(symmetry_null(24).mean_of(8).best_of(10) - symmetry_null(24).mean),
    }
    assert found["cosine"]["best"] == pytest.approx(cosine_null(24).best_of(80))
    assert found["right"]["mean"] == 4 / 24
