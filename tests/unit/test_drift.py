"""What changed from one model to another, and which head is which, against forms held whole in float64."""

import doctest
import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headgram
from headgram.forms.circuits import CIRCUITS, ov, qk
from headgram.geometry.drift import drift
from headgram.geometry.matches import matches

pytestmark = pytest.mark.usefixtures("both_ways")


def dense(heads):
    return np.stack([heads.form(i).numpy() for i in range(len(heads))])


def spans(form, count):
    """Left and right singular vectors of the values that are not zero, as columns."""
    u, s, vh = np.linalg.svd(form)
    rank = min(count, int((s > 1e-10 * max(s[0], 1e-300)).sum()))
    return u[:, :rank], vh[:rank].T


@st.composite
def two_models(draw):
    """Heads of one shape before and after, in either circuit: shared factors, ranks beyond the width, dead and equal heads."""
    kv_heads, layers = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    rank, width = draw(st.integers(1, 7)), draw(st.sampled_from([2, 3, 8, 17, 40]))
    circuit = draw(st.sampled_from(list(CIRCUITS.values())))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    before = [scale * torch.randn(layers, n, rank, width, generator=generator, dtype=torch.float64) for n in (4, kv_heads)]
    moved = 10.0 ** draw(st.integers(-9, 1))
    after = [w + moved * scale * torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in before]
    for flaw in draw(st.sets(st.sampled_from(["dead before", "dead after", "same", "low rank"]))):
        if flaw == "dead before":
            before[0][0, 0] = 0
        elif flaw == "dead after":
            after[0][0, 1] = 0
        elif flaw == "same":
            after[0][0, 2], after[1][0] = before[0][0, 2], before[1][0]
        else:
            before[0][0, 3, rank // 2 :] = 0
    return circuit.heads(*before), circuit.heads(*after)


@settings(max_examples=40)
@given(two_models())
def test_drift_is_what_dense_forms_say(pair):
    before, after = pair
    found, x, y = drift(before, after), dense(before), dense(after)
    sizes = np.linalg.norm(before.left(), axis=(1, 2)) * np.linalg.norm(before.right(), axis=(1, 2))
    sizes_after = np.linalg.norm(after.left(), axis=(1, 2)) * np.linalg.norm(after.right(), axis=(1, 2))
    for i in range(len(before)):
        size = max(sizes[i], sizes_after[i])
        # What forming the difference itself rounds: the judge's error.
        judge = 1e-13 * size
        norm, delta = np.linalg.norm(x[i]), y[i] - x[i]
        change = np.linalg.norm(delta)
        assert abs(found.change_norm[i] - change) <= judge + 1e-12 * change
        values = np.linalg.svd(delta, compute_uv=False)
        values = np.pad(values, (0, max(0, 2 * before.rank - len(values))))[: 2 * before.rank]
        assert np.abs(found.change_values[i].numpy() - values).max() <= judge + 1e-12 * change
        if norm == 0:
            ratios = (found.cosine, found.norm_ratio, found.change, found.floor, found.inside)
            assert [float(each[i]) for each in ratios] == [0] * len(ratios)
            continue
        assert float(found.change[i]) == pytest.approx(change / norm, rel=1e-9, abs=judge / norm)
        assert float(found.norm_ratio[i]) == pytest.approx(np.linalg.norm(y[i]) / norm, rel=1e-9)
        other = np.linalg.norm(y[i])
        cosine = (x[i] * y[i]).sum() / norm / other if other else 0
        assert float(found.cosine[i]) == pytest.approx(cosine, abs=1e-9)
        if change > 1e3 * judge:
            left, right = spans(x[i], before.rank)
            parts = {"inside_left": left.T @ delta, "inside_right": delta @ right, "inside": left.T @ delta @ right}
            for name, part in parts.items():
                expected = np.linalg.norm(part) ** 2 / change**2
                assert float(getattr(found, name)[i]) == pytest.approx(expected, abs=1e-2 * judge / change + 1e-6), name
            share = values[values > 1e-9 * values[0]] ** 2 / change**2
            assert float(found.change_rank[i]) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)


def test_nothing_cancels_where_weights_hardly_moved():
    """A change of 1e-14 of the form is measured to seven digits; the difference of two forms has none left."""
    generator = torch.Generator().manual_seed(0)
    w_q, w_k = (torch.randn(3, 4, 30, generator=generator, dtype=torch.float64).round(decimals=2) for _ in range(2))
    step = 2.0**-46 * torch.randn(3, 4, 30, generator=generator, dtype=torch.float64).sign()
    found = drift(qk(w_q, w_k), qk(w_q + step, w_k))
    moved = (w_q + step) - w_q  # what is left of the step after rounding, exactly
    truth = torch.linalg.matrix_norm(w_k.mT @ moved)
    np.testing.assert_allclose(found.change_norm, truth, rtol=1e-7)
    assert float(found.equal[0]) == pytest.approx(((moved == 0).double().mean(dim=(1, 2)) + 1)[0] / 2)


def test_the_floor_is_what_storage_in_16_bits_moves():
    for kind, dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        generator = torch.Generator().manual_seed(1)
        w_v, w_o = (torch.randn(n, 16, 200, generator=generator).to(dtype) / 30 for n in (2, 6))
        true = [w.double() * (1 + 1e-6) for w in (w_v, w_o)]  # near the stored ones, and between the numbers of the type
        true = [w + w.abs() * torch.rand(w.shape, generator=generator) * 0.01 for w in true]
        found = drift(ov(*(w.to(dtype) for w in true)), ov(*(w.to(dtype) for w in true)))
        exact, rounded = dense(ov(*true)), dense(ov(*(w.to(kind).double() for w in true)))
        moved = np.linalg.norm(rounded - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
        np.testing.assert_allclose(found.floor, moved, rtol=0.1)
        assert (found.equal == 1).all()
        assert (found.change == 0).all()


def test_a_head_that_grows_into_new_directions():
    """Half of the change in the old span, half outside of it."""
    eye = torch.eye(8, dtype=torch.float64)
    before = qk(eye[None, :2], eye[None, :2])
    after = qk(torch.stack([eye[0] + eye[5], eye[1]])[None], torch.stack([eye[0], 2 * eye[1]])[None])
    found = drift(before, after)
    # The change is e0 e5^T + e1 e1^T.
    assert float(found.change_rank[0]) == pytest.approx(2)
    shares = [float(each[0]) for each in (found.inside_right, found.inside_left, found.inside)]
    assert shares == pytest.approx([0.5, 1, 0.5])


def test_the_expected_share_inside_is_that_of_random_changes():
    """Also of a head that is dead, and of one whose rows depend on others: less can lie in its own directions."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(3, 4, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    queries[1, 2:] = queries[1, :2]
    queries[2] = 0
    before = qk(queries, keys)
    found = drift(before, before)
    assert found.inside_expected.tolist() == [4 / 24, 2 / 24, 0]
    forms = dense(before)
    change = np.random.default_rng(0).normal(size=(4000, 24, 24)) / 24
    for form, expected in zip(forms, found.inside_expected.tolist(), strict=True):
        left, right = spans(form, 4)
        for inside in (np.einsum("nij,jk->nik", change, right), np.einsum("nij,ik->njk", change, left)):
            share = (inside**2).sum((1, 2)) / (change**2).sum((1, 2))
            assert abs(share.mean() - expected) < 1e-3


def test_sets_of_other_shapes_are_refused():
    one, other = qk(torch.ones(4, 2, 8), torch.ones(2, 2, 8)), qk(torch.ones(4, 2, 8), torch.ones(4, 2, 8))
    with pytest.raises(headgram.HeadgramError, match="share their factors alike"):
        drift(one, other)
    with pytest.raises(headgram.HeadgramError, match="NaN"):
        drift(one, qk(torch.full((4, 2, 8), torch.nan), torch.ones(2, 2, 8)))


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 2**31))
def test_the_assignment_is_the_best_of_all(count, seed):
    cosines = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    found, likeness = matches(cosines), cosines.abs().numpy()
    best = max(likeness[range(count), order].sum() for order in itertools.permutations(range(count)))
    assert sorted(found.place.tolist()) == list(range(count))
    assert likeness[range(count), found.place].sum() == pytest.approx(best)
    for i, place in enumerate(found.place.tolist()):
        others = np.delete(likeness[i], place)
        assert float(found.value[i]) == float(cosines[i, place])
        assert float(found.margin[i]) == pytest.approx(likeness[i, place] - others.max(initial=0))
        assert bool(found.mutual[i]) == (likeness[i].argmax() == place and likeness[:, place].argmax() == i)


def test_a_dead_head_is_no_other_head_again():
    """Head 1 died and head 2 woke: what is left over is no match, and the only nearest heads are those that live."""
    found = matches(torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0.5, 0]]))
    assert found.place.tolist() == [0, 2, 1]
    assert found.mutual.tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["headgram.geometry.drift", "headgram.geometry.matches"])
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
