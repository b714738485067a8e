"""Few eigenvectors of symmetric matrices against all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headgram.geometry import eigen
from headgram.geometry.eigen import largest_magnitude, largest_singular

pytestmark = pytest.mark.usefixtures("both_ways")


@st.composite
def matrices(draw):
    """Symmetric matrices of given spectra: random, in clusters, in pairs of opposite signs, of low rank, zero, diagonal."""
    n, seed = draw(st.integers(1, 70)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator, dtype=torch.float64)
    match draw(st.sampled_from(["random", "clusters", "pairs", "low rank", "zero", "steep", "identity"])):
        case "clusters":
            values = values.sign() + 1e-13 * values
        case "pairs":
            values[n // 2 : 2 * (n // 2)] = -values[: n // 2]
        case "low rank":
            values[1:] = 0
        case "zero":
            values[:] = 0
        case "steep":
            values = values.sign() * 10 ** (-3 * torch.arange(n, dtype=torch.float64))
        case "identity":
            values[:] = 1
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    if draw(st.booleans()):
        basis = torch.eye(n, dtype=torch.float64)
    matrix = basis * values @ basis.T * 10.0 ** draw(st.integers(-100, 100))
    return (matrix + matrix.T) / 2


@given(matrices(), st.integers(1, 12))
def test_values_and_vectors_are_those_of_numpy_by_magnitude(matrix, count):
    count = min(count, len(matrix))
    values, vectors = (found[0] for found in largest_magnitude(matrix[None], count))
    size = matrix.abs().max() * len(matrix) + 1e-300
    expected = torch.linalg.eigvalsh(matrix)
    assert (values.sort().values - expected).abs().max() <= 1e-13 * size
    magnitudes = values.abs()
    assert (magnitudes[1:] <= magnitudes[:-1] + 1e-11 * size).all()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (vectors @ matrix - values[:count, None] * vectors).abs().max() <= 1e-12 * size


def test_one_by_one_gives_what_all_give():
    """Where only a few are wanted they are computed alone, and agree with all."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 96, 96, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    values, vectors = largest_magnitude(matrix, 8)
    all_values, all_vectors = largest_magnitude(matrix, 96)
    torch.testing.assert_close(values, all_values, rtol=0, atol=1e-12)
    signs = (vectors * all_vectors[:, :8]).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(vectors * signs, all_vectors[:, :8], rtol=0, atol=1e-12)


def test_vectors_that_do_not_hold_are_computed_anew(monkeypatch):
    """As where an iteration fails: all vectors are computed, and no wrong one is returned."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 96, 96, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    expected = eigen._all(matrix, 8)
    monkeypatch.setattr("scipy.linalg.lapack.dstein", lambda d, e, w, blocks, ends: (torch.ones(96, len(w)).double().numpy(), 0))
    for found, known in zip(largest_magnitude(matrix, 8), expected, strict=True):
        assert torch.equal(found, known)


@given(matrices(), st.integers(1, 12))
def test_singular_values_and_vectors_are_those_of_numpy(matrix, count):
    count = min(count, len(matrix))
    general = matrix @ torch.linalg.qr(matrix + torch.eye(len(matrix), dtype=torch.float64) * matrix.abs().max()).Q
    left, values, right = (found[0] for found in largest_singular(general[None], count))
    expected = torch.linalg.svdvals(general)
    size = expected[0] + 1e-300
    assert (values - expected).abs().max() <= 1e-13 * len(matrix) * size
    alive = (values[:count] > 1e-11 * size).double()
    for rows in (left * alive[:, None], right * alive[:, None]):
        torch.testing.assert_close(rows @ rows.T, torch.diag(alive), rtol=0, atol=1e-12)
    assert ((general @ right.T).T - values[:count, None] * left).mul(alive[:, None]).abs().max() <= 1e-12 * len(matrix) * size


def test_singular_values_near_zero_have_vectors():
    """Of a matrix of nearly rank one; only what cannot be told from zero may go without."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(128, 128, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    values = torch.zeros(128, dtype=torch.float64)
    values[:4] = torch.tensor([1, 1e-6, 1e-13, 3e-14])
    left, s, right = (found[0] for found in largest_singular((u * values @ v.T)[None], 8))
    alive = s[:8] > 1e-14
    for rows in (left, right):
        torch.testing.assert_close((rows @ rows.T)[alive][:, alive], torch.eye(int(alive.sum()), dtype=torch.float64))


@pytest.mark.parametrize("flaw", ["wrong vectors", "not a number", "not converged"])
def test_solutions_of_a_batch_that_do_not_hold_are_computed_anew(monkeypatch, caplog, flaw):
    """As of a GPU's routine that goes wrong in silence, or says so."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 40, 40, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT

    def faulty(matrices):
        values, vectors = torch.linalg.eigh(matrices)
        if flaw == "not converged":
            raise torch.linalg.LinAlgError
        if flaw == "not a number":
            values[1] = torch.nan
        else:
            vectors[1, :, 3] = vectors[1, :, 4]
        return values, vectors

    monkeypatch.setattr("headgram.geometry.blocks.ONE_BY_ONE", ())
    expected = *largest_magnitude(matrix, 40), *largest_singular(matrix, 8)
    monkeypatch.setattr(eigen, "_batched_eigh", faulty)
    for found, known in zip((*largest_magnitude(matrix, 40), *largest_singular(matrix, 8)), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=0, atol=1e-12)
    assert ("3 of 3" if flaw == "not converged" else "1 of 3") in caplog.text
