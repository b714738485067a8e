"""Composition, and the eigenvalues of forms, against matrices held whole in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headgram.errors import HeadgramError
from headgram.forms.circuits import ov, qk
from headgram.forms.reading import Rotary
from headgram.geometry import composition, inner
from headgram.geometry.composition import KINDS, acausal, channels, composed, reads, scores, times_chance, writes
from headgram.geometry.eigenvalues import eigenvalues
from headgram.geometry.nulls import deviations
from rotated import rotated

pytestmark = pytest.mark.usefixtures("both_ways")


def dense(heads):
    """Every form as a matrix, (n, d, d)."""
    return torch.stack([heads.to(torch.float64).form(i) for i in range(len(heads))])


def whole(kind, g, o):
    """The composed form of every later head with every earlier one, (n_b, n_a, d, d)."""
    if kind == "k":
        return o.mT[None] @ g[:, None]
    return (g if kind == "q" else o)[:, None] @ o[None]


def definition(kind, g, o):
    b = o if kind == "v" else g
    norms = b.norm(dim=(1, 2))[:, None] * o.norm(dim=(1, 2))
    return torch.nan_to_num(whole(kind, g, o).norm(dim=(2, 3)) / norms)


def weights(layers, heads, kv_heads, rank, width, value_rank=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ranks = (rank, rank, value_rank or rank, value_rank or rank)
    counts = (heads, kv_heads, kv_heads, heads)
    found = [
        torch.randn(layers, n, r, width, generator=generator, dtype=torch.float64) for n, r in zip(counts, ranks, strict=True)
    ]
    return [each.to(dtype) for each in found]


@st.composite
def models(draw):
    """Query, key, value and output weights: shared ones, values of another rank, outlier channels, sides that hardly meet."""
    found = weights(
        draw(st.integers(1, 3)),
        4,
        draw(st.sampled_from([1, 2, 4])),
        draw(st.integers(1, 6)),
        width := draw(st.sampled_from([4, 17, 40])),
        draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**31)),
    )
    for each in found:
        falling = 10.0 ** -torch.linspace(0, draw(st.integers(0, 6)), each.shape[2], dtype=torch.float64)
        each.mul_(10.0 ** draw(st.integers(-8, 8)) * falling[:, None])
        each[..., draw(st.integers(0, width - 1))] *= 10.0 ** draw(st.integers(0, 3))
    if draw(st.booleans()):
        for reading, writing in zip(found[:2], found[2:], strict=True):
            reading[..., : width // 2] *= 1e-5
            writing[..., width // 2 :] *= 1e-5
    if draw(st.booleans()):
        found[draw(st.integers(0, 3))][0, 0] = 0
    return [each.to(draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))) for each in found]


@settings(max_examples=40)
@given(models(), st.sampled_from(["products", "strips"]), st.sampled_from(list(KINDS)))
def test_scores_are_their_definition(model, route, kind):
    w_q, w_k, w_v, w_o = model
    forms = qk(w_q, w_k), ov(w_v, w_o)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "cheapest", lambda *_: route)
        found = scores(reads(kind, forms[kind == "v"]), writes(forms[1]))
    truth = definition(kind, *map(dense, forms))
    assert found.dtype == torch.float64
    # The definition itself is rounded: where forms hardly meet, by a unit of rounding of their norms.
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-13)


def test_pairs_that_hardly_meet_keep_their_digits():
    # One direction of each side holds nearly all of it, and the two are orthogonal in a basis that no axis shows.
    basis = torch.linalg.qr(torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    found = [each * 1e-5 for each in weights(1, 4, 4, 8, 256)]
    for each, direction in zip(found, (0, 0, 0, 1), strict=True):
        each[..., 0, :] = basis[direction]
    forms = qk(*found[:2]), ov(*found[2:])
    truth = definition("k", *map(dense, forms))
    assert (truth < 1e-3).all()
    torch.testing.assert_close(scores(reads("k", forms[0]), writes(forms[1])), truth, rtol=1e-5, atol=0)
    with pytest.MonkeyPatch.context() as patch:  # which float32 alone does not do
        patch.setattr(composition, "_WEAK", 0)
        rough = scores(reads("k", forms[0]), writes(forms[1]))
    assert ((rough - truth).abs() > 1e-5 * truth).any()


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_that_of_a_reader_turned_at_random(kind):
    width, turns = 12, 4000
    w_q, w_k, w_v, w_o = weights(1, 1, 1, 3, width, value_rank=2, seed=3)
    w_o[..., 0, :] *= 4
    generator = torch.Generator().manual_seed(4)
    rotations = torch.linalg.qr(torch.randn(turns, width, width, generator=generator, dtype=torch.float64))[0]
    # Only columns are made of Haar measure by their signs, which products with symmetric forms do not see.
    turned = qk(w_q[0] @ rotations, w_k[0] @ rotations), ov(w_v[0] @ rotations, w_o[0].expand(turns, -1, -1))
    writers = writes(ov(w_v, w_o))
    readers = reads(kind, turned[kind == "v"])
    found = scores(readers, writers)
    z = deviations(found.square(), readers.moments, writers.moments, width)
    assert abs(z.mean()) < 4 / math.sqrt(turns)
    assert abs(z.std() - 1) < 0.1
    assert abs(times_chance(found, width).square().mean() - 1) < 0.1


@pytest.mark.parametrize("kind", ["q", "k"])
@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(torch.tensor([1, 3, 2]) * 2 * math.pi / 12, interleaved=True),
        Rotary(torch.tensor([1, 2]) * 2 * math.pi / 12, interleaved=False, start=2, factor=1.3),
        Rotary(torch.tensor([2, 0, 2]) * 2 * math.pi / 12, interleaved=False),  # equal frequencies, and one that stands still
    ],
    ids=["interleaved", "halves, partial, scaled", "equal and zero"],
)
def test_under_rotary_encoding_a_score_is_of_the_mean_over_offsets(kind, rotary):
    w_q, w_k, w_v, w_o = weights(1, 4, 2, 6, 20, value_rank=3, seed=8)
    g, o = qk(w_q, w_k), ov(w_v, w_o)
    forms = torch.stack([dense(rotated(g, rotary, offset)) for offset in range(12)])  # the turns come round after 12 tokens
    truth = torch.stack([whole(kind, each, dense(o)).square().sum((2, 3)) for each in forms]).mean(0)
    norms = forms.square().sum((2, 3)).mean(0)[:, None] * dense(o).square().sum((1, 2))
    found = scores(reads(kind, g, rotary), writes(o))
    torch.testing.assert_close(found, (truth / norms).sqrt(), rtol=1e-6, atol=0)
    still = scores(reads(kind, g), writes(o))
    assert ((found - still).abs() > 1e-3).any()


def test_what_cannot_deviate_from_chance_has_no_deviation():
    everything = torch.eye(4).expand(1, 1, 4, 4)
    one = torch.zeros(1, 1, 4, 4)
    one[..., 0, 0] = 1
    for of_read in (everything, torch.zeros_like(everything)):
        forms = qk(of_read, of_read), ov(one, one)
        readers, writers = reads("q", forms[0]), writes(forms[1])
        assert deviations(scores(readers, writers).square(), readers.moments, writers.moments, 4).tolist() == [[0.0]]


def test_acausal_is_a_percentile_among_writers_of_later_layers():
    generator = torch.Generator().manual_seed(5)
    layer = torch.arange(4).repeat_interleave(3)
    score = torch.randint(0, 5, (12, 12), generator=generator).double() / 4  # with equal ones
    share, later = acausal(score, layer, layer)
    for reader in range(12):
        others = score[reader, layer > layer[reader]]
        assert later[reader] == len(others)
        for writer in range(12):
            own = score[reader, writer]
            expected = ((others < own).sum() + (others == own).sum() / 2) / max(1, len(others))
            assert share[reader, writer] == pytest.approx(expected.item())
    assert share[layer == 3].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_channels_are_those_of_the_composed_forms(kind, kv_heads):
    w_q, w_k, w_v, w_o = weights(2, 3, kv_heads, 4, 20, value_rank=3, seed=6)
    g, o = qk(w_q, w_k), ov(w_v, w_o)
    later, earlier = [3, 5, 4], [0, 2, 2]
    found = channels(kind, o.take(earlier), (o if kind == "v" else g).take(later), topk=2)
    truth = whole(kind, dense(g), dense(o))[later, earlier]
    np.testing.assert_allclose(dense(composed(kind, o.take(earlier), (o if kind == "v" else g).take(later))), truth, atol=1e-12)
    s = torch.linalg.svdvals(truth)
    values = found.singular_values
    torch.testing.assert_close(values[:, :3], s[:, :3])
    assert values[:, 3:].lt(1e-12).all()
    assert s[:, 3:].lt(1e-12).all()
    torch.testing.assert_close(found.eigenvalues.values.sum(-1).real, truth.diagonal(dim1=1, dim2=2).sum(-1))
    share = s[:, :3].square() / s.square().sum(-1, keepdim=True)
    torch.testing.assert_close(found.first, share[:, 0])
    torch.testing.assert_close(found.effective_rank, torch.exp(-(share * share.log()).sum(-1)))
    lifted = torch.einsum("nxy,nky->nkx", truth, found.right)
    torch.testing.assert_close(lifted, values[:, :2, None] * found.left)
    source = found.left if kind == "k" else found.right
    carried = torch.einsum("nxy,nky->nkx", dense(o)[earlier], source)
    torch.testing.assert_close(found.carried, carried / carried.norm(dim=-1, keepdim=True))


@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([1, 2, 4]), st.sampled_from([3, 8, 17]))
@settings(max_examples=20)
def test_eigenvalues_and_their_scores_are_those_of_the_forms(seed, rank, kv_heads, width):
    w_v, w_o = weights(1, 4, kv_heads, rank, width, seed=seed)[2:]
    w_o[0, 0] = 0
    heads = ov(w_v, w_o)
    found, o = eigenvalues(heads), dense(heads)
    truth = torch.linalg.eigvals(o)
    truth = truth.gather(-1, truth.abs().argsort(dim=-1, descending=True))
    size, magnitude = o.norm(dim=(1, 2)), truth.abs()
    assert found.values.shape == (4, rank)
    torch.testing.assert_close(found.values.sum(-1), truth.sum(-1), rtol=0, atol=1e-9)
    count = min(rank, width)
    torch.testing.assert_close(found.values.abs()[:, :count], magnitude[:, :count], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.trace_z[1:], o.diagonal(dim1=1, dim2=2).sum(-1)[1:] * math.sqrt(width) / size[1:])
    kept = found.values.abs()
    torch.testing.assert_close(found.copying[1:], found.values.real.sum(-1)[1:] / kept.sum(-1)[1:])
    energy = kept.square().sum(-1)
    torch.testing.assert_close(found.departure.square()[1:], (1 - energy / size.square()).clamp_min(0)[1:], rtol=0, atol=1e-9)
    positive = torch.where(found.values.real > 0, kept.square(), 0).sum(-1)
    torch.testing.assert_close(found.positive[1:], positive[1:] / energy[1:])
    for score in (found.copying, found.positive, found.departure, found.trace_z):
        assert score[0] == 0


def test_scores_of_forms_whose_eigenvalues_are_known():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # ±i
    shift = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # 0, 0: nilpotent
    weights_o = torch.stack([torch.eye(2), -torch.eye(2), turn.T, shift.T])
    found = eigenvalues(ov(torch.eye(2).expand(4, 2, 2), weights_o))
    torch.testing.assert_close(found.copying, torch.tensor([1.0, -1, 0, 0]).double())
    torch.testing.assert_close(found.positive[[0, 1, 3]], torch.tensor([1.0, 0, 0]).double())
    torch.testing.assert_close(found.departure, torch.tensor([0.0, 0, 0, 1]).double())
    torch.testing.assert_close(found.trace_z, torch.tensor([2.0, -2, 0, 0]).double())
    with pytest.raises(HeadgramError, match="square"):
        eigenvalues(ov(torch.ones(1, 2, 3), torch.ones(1, 2, 4)))


def induction_circuit(width=64, rank=8, heads=4):
    """Two layers of random heads, and between them a circuit by hand.

    The stream's first `rank` channels hold the token, the next the position, the third block what came before. Head 1 of the
    first layer moves the token of the position before into the third block; head 2 of the second looks for a token like its own
    there, and copies the token.
    """
    w_q, w_k, w_v, w_o = weights(2, heads, heads, rank, width, seed=7)
    token, position, before = (torch.eye(width, dtype=torch.float64)[start * rank : (start + 1) * rank] for start in range(3))
    w_q[0, 1], w_k[0, 1], w_v[0, 1], w_o[0, 1] = position, position.roll(1, 0), token, before
    w_q[1, 2], w_k[1, 2], w_v[1, 2], w_o[1, 2] = token, before, token, token
    return qk(w_q, w_k), ov(w_v, w_o)


def test_an_induction_circuit_made_by_hand_is_the_strongest_pair():
    g, o = induction_circuit()
    writers, layer = writes(o), torch.arange(2).repeat_interleave(4)
    found = {kind: scores(reads(kind, o if kind == "v" else g), writers)[layer == 1][:, layer == 0] for kind in KINDS}
    kind, (reader, writer) = max(
        ((kind, divmod(int(score.argmax()), 4)) for kind, score in found.items()), key=lambda each: found[each[0]][each[1]]
    )
    assert (kind, reader, writer) == ("k", 2, 1)
    # All of what is written is read, in eight equal directions.
    assert found["k"][2, 1] == pytest.approx(1 / math.sqrt(8))
    assert eigenvalues(o).copying[4 + 2] == pytest.approx(1)
    flow = channels("k", o.take([1]), g.take([6]), topk=8)
    assert flow.eigenvalues.copying.item() == pytest.approx(1)  # it looks for tokens that follow one like its own
    torch.testing.assert_close(flow.singular_values, torch.ones(1, 8).double())
    assert flow.carried[..., 16:24].norm() == pytest.approx(math.sqrt(8))
