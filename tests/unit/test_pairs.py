"""Inner products against the definition."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import headgram
from headgram.geometry import costs, inner, routes
from same_index import pair_products

pytestmark = pytest.mark.usefixtures("both_ways")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}
ROUTES = ("products", "strips")


@st.composite
def runs(draw):
    """Two runs of layers; the second may be the first."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    rank, hidden = draw(st.integers(1, 8)), draw(st.sampled_from([2, 3, 8, 17, 24, 40]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weights = []
    for n in (draw(st.integers(1, 5)), draw(st.integers(1, 4))):
        scale = 10.0 ** draw(st.integers(-12, 12))
        for count in (4, kv_heads):
            weight = torch.randn(n, count, rank, hidden, generator=generator, dtype=torch.float64) * scale
            if draw(st.booleans()):
                weight[0, 0] = 0
            weights.append(weight.to(dtype))
    return weights[:2] * 2 if draw(st.booleans()) else weights


def forms(w_q, w_k):
    w_k = w_k.double().numpy()[:, np.arange(w_q.shape[1]) * w_k.shape[1] // w_q.shape[1]]
    return np.einsum("lhrx,lhry->lhxy", w_k, w_q.double().numpy())


@given(runs(), st.sampled_from(["auto", "float64"]), st.sampled_from(ROUTES), st.sampled_from([1, 2**30]))
def test_products_agree_with_the_definition(weights, precision, route, block_bytes):
    g_a, g_b = forms(*weights[:2]), forms(*weights[2:])
    bound = np.einsum("ah,bh->abh", *(np.sqrt((g**2).sum((2, 3))) for g in (g_a, g_b)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "cheapest", lambda *_: route)
        patch.setattr(routes, "PRODUCT_BYTES", {"cpu": block_bytes})
        patch.setattr(inner, "EXACT_BYTES", {"cpu": block_bytes})
        patch.setattr(routes, "STRIP_BYTES", {"cpu": block_bytes})
        measured = pair_products(*weights, precision)
    expected = np.einsum("ahxy,bhxy->abh", g_a, g_b), np.einsum("ahxy,bhyx->abh", g_a, g_b)
    for value, truth in zip((measured.gram, measured.transposed), expected, strict=True):
        assert value.dtype == torch.float64
        assert (np.abs(value.numpy() - truth) <= TOLERANCE[weights[0].dtype] * bound).all()
    assert measured.route == route
    assert measured.exact.all() or precision == "auto"


def test_the_public_door_is_exact():
    generator = torch.Generator().manual_seed(1)
    w_q, w_k = torch.randn(5, 6, 8, 32, generator=generator), torch.randn(5, 3, 8, 32, generator=generator)
    gram = headgram.gram(w_q, w_k, w_q, w_k, precision="float64")
    quick = headgram.gram(w_q, w_k, w_q, w_k)
    assert ((quick - gram).abs() <= 1e-6 * (gram.diagonal().T.sqrt()[:, None] * gram.diagonal().T.sqrt())).all()
    for layer in range(5):
        np.testing.assert_allclose(gram[layer, layer], headgram.spectrum(w_q[layer], w_k[layer]).fro_sq, rtol=1e-13)
    torch.testing.assert_close(gram, gram.transpose(0, 1), rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_is_taken_where_it_is_accurate_and_only_there(monkeypatch, route, same, dtype):
    monkeypatch.setattr(inner, "cheapest", lambda *_: route)
    generator = torch.Generator().manual_seed(2)
    w_q, w_k = (torch.randn(6, 2, 16, 64, generator=generator).to(dtype) for _ in range(2))
    # Head 1 of layer 3: rows that cancel each other but for a small rest.
    w_q[3, 1, 1::2] = w_q[3, 1, ::2]
    w_k[3, 1, 1::2] = -w_k[3, 1, ::2]
    small = (torch.randn(8, 64, generator=generator) * 2.0**-6).to(dtype)
    w_q[3, 1, 1], w_k[3, 1, 1] = small[0], small[1]
    w_q[3, 1, 0] = 0
    other = (w_q, w_k) if same else (w_q.clone(), w_k.clone())
    measured = pair_products(w_q, w_k, *other, "auto")
    assert measured.exact.tolist() == [False, True]
    g = forms(w_q, w_k)
    norms = np.sqrt((g**2).sum((2, 3)))
    expected = np.einsum("ahxy,bhxy->abh", g, g)
    assert (np.abs(measured.gram.numpy() - expected) <= 1e-6 * norms[:, None] * norms[None]).all()


@pytest.mark.parametrize("route", ROUTES)
def test_long_sums_of_positive_terms_stay_accurate_in_float32(monkeypatch, route):
    monkeypatch.setattr(inner, "cheapest", lambda *_: route)
    generator = torch.Generator().manual_seed(5)
    w_q, w_k = torch.randn(6, 2, 32, 512, generator=generator), torch.randn(6, 2, 32, 512, generator=generator)
    fast, exact = (pair_products(w_q, w_k, w_q, w_k, precision) for precision in ("auto", "float64"))
    assert not fast.exact.any()
    norms = exact.gram.diagonal(dim1=0, dim2=1).T.sqrt()
    bound = 2e-7 * norms[:, None] * norms[None]
    assert ((fast.gram - exact.gram).abs() <= bound).all()
    assert ((fast.transposed - exact.transposed).abs() <= bound).all()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_several_threads_multiply_the_same(two_threads):
    w_q, w_k = torch.randn(40, 5, 4, 24), torch.randn(40, 5, 4, 24)
    forms = (w_k.double().mT @ w_q.double()).flatten(-2)
    products = headgram.gram(w_q, w_k, w_q, w_k)
    size = forms.norm(dim=-1)
    error = products - torch.einsum("ahx,bhx->abh", forms, forms)
    assert float((error.abs() / (size[:, None] * size)).max()) < 1e-6


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)]
)
@pytest.mark.parametrize("route", ROUTES)
def test_weights_may_be_stored_differently(monkeypatch, route, dtypes):
    monkeypatch.setattr(inner, "cheapest", lambda *_: route)
    generator = torch.Generator().manual_seed(6)
    w_q, w_k = (torch.randn(3, 2, 8, 32, generator=generator).to(dtype) for dtype in dtypes)
    fast, exact = (pair_products(w_q, w_k, w_q, w_k, precision) for precision in ("auto", "float64"))
    assert not fast.exact.any()
    torch.testing.assert_close(fast.gram, exact.gram, rtol=1e-5, atol=1e-5 * float(exact.gram.max()))


def cutting_off(a, b, out=None):
    """A product as tensor cores form it: 16 terms at a time, each new partial sum cut off to float32."""
    total = torch.zeros(len(a), a.shape[1], b.shape[2], dtype=torch.float64)
    for start in range(0, a.shape[2], 16):
        exact = total + a[:, :, start : start + 16].double() @ b[:, start : start + 16].double()
        near = exact.float()
        total = torch.where(near.abs() > exact.abs(), near.nextafter(torch.zeros(())), near).double()
    return total.float() if out is None else out.copy_(total)


def test_where_tensor_cores_cut_partial_sums_off_long_sums_are_made_of_pieces(monkeypatch):
    monkeypatch.setattr("headgram.geometry.blocks.ONE_BY_ONE", ())
    monkeypatch.setattr(inner, "cheapest", lambda *_: "products")
    assert routes.longest_sum.__wrapped__(torch.device("cpu")) == 2**14
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(3, 1, 16, 4096, generator=generator).bfloat16() for _ in range(2)] * 2
    exact = pair_products(*weights)
    monkeypatch.setattr(routes, "_by_tensor_cores", cutting_off)

    def error(longest):
        monkeypatch.setattr(routes, "longest_sum", lambda _: longest)
        fast = pair_products(*weights, "auto")
        assert not fast.exact.any()
        norms = exact.gram.diagonal().T.sqrt()
        return float(((fast.gram - exact.gram).abs() / (norms[:, None] * norms)).max())

    found = routes.longest_sum.__wrapped__(torch.device("cpu"))
    assert 64 <= found <= 512
    assert error(found) < 1e-6 < error(2**14)


@pytest.mark.parametrize("shape", [(30, 64, 576), (28, 128, 1024), (36, 128, 2560), (4, 64, 4096), (1, 8, 8)])
def test_the_chosen_route_is_the_one_with_fewer_operations(shape):
    sizes = costs.Sizes.unshared(shape[0], *shape, same=True)
    counted = {route: costs.flops(route, sizes) for route in ROUTES}
    assert counted[costs.cheapest(sizes)] == min(counted.values())


@pytest.mark.parametrize("shape", [(2, 4, 3, 6), (2, 4, 3), (2, 3, 3, 5), (0, 4, 3, 5)])
def test_shapes_must_fit(shape):
    good_q, good_k = torch.zeros(2, 4, 3, 5), torch.zeros(2, 2, 3, 5)
    with pytest.raises(headgram.HeadgramError):
        headgram.gram(torch.zeros(shape), good_k, good_q, good_k)


def test_the_z_score_is_that_of_randomly_rotated_forms():
    """`cosine · d` has mean 0 and variance 1 if one form is turned by random rotations of both its sides."""
    random = np.random.default_rng(3)
    g_a, g_b = (random.normal(size=(2, 7)).T @ random.normal(size=(2, 7)) for _ in range(2))
    turned = [u @ g_b @ v.T for u, v in scipy.stats.ortho_group.rvs(7, size=8000, random_state=4).reshape(4000, 2, 7, 7)]
    z = 7 * np.array([(g_a * g).sum() for g in turned]) / np.linalg.norm(g_a) / np.linalg.norm(g_b)
    assert abs(z.mean()) < 5 / np.sqrt(4000)
    assert abs(z.var() - 1) < 0.2
