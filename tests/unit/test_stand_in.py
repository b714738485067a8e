"""The pretended GPU is strict, and headgram does on it what it should do on a real one: counted, and held against the CPU."""

import json
from dataclasses import fields

import pytest
import torch

import headgram
from headgram.errors import HeadgramError
from headgram.forms.circuits import ov, qk
from headgram.forms.reading import Rotary
from headgram.geometry import composition, drift, frequencies, inner, routes, scores, spectra
from headgram.geometry.inner import inner_products
from headgram.geometry.neighbours import span_overlaps
from headgram.geometry.original import original_quantities
from headgram.geometry.overlaps import overlaps
from headgram.geometry.same_index import same_index_products
from headgram.geometry.scores import layer_scores
from headgram.geometry.spans import kernels, spans
from headgram.geometry.spectra import Spectrum
from headgram.geometry.token_space import TokenProducts, between_tokens, centred_gram
from headgram.results.factors import write_factors
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.results.tables import read_table
from headgram.stages.eigen import measure_shard
from headgram.stages.gram import measure_row
from headgram.study.options import Config
from stand_in import StandIn

#: The sizes of batches and blocks, by device: (module, name).
SIZES = [
    *((spectra, "SPECTRA_BYTES"), (inner, "EXACT_BYTES"), (routes, "PRODUCT_BYTES"), (routes, "STRIP_BYTES")),
    *((scores, "BLOCK"), (drift, "_BLOCK_BYTES"), (routes, "_TERMS")),
]
#: How a layer turns its queries and keys: not all of their rows, and scaled.
TURNS = Rotary(torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64), interleaved=True, start=1, factor=1.25)
LATE = getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(routes, "_LONGEST", 128)  # a CPU takes long for the longest sums
    routes.longest_sum.cache_clear()
    with StandIn() as device:
        yield device
    routes.longest_sum.cache_clear()


@pytest.fixture
def alike(monkeypatch):
    """A CPU that takes all heads at once, in batches and blocks as large as a GPU's, which are small here."""
    monkeypatch.setattr("headgram.geometry.blocks.ONE_BY_ONE", ())
    for module, name in SIZES:
        size = {"BLOCK": 16, "_TERMS": 2**10}.get(name, 2**18)
        monkeypatch.setattr(module, name, {"cpu": size, "cuda": size})


def weights(layers, heads, kv_heads, rank, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(layers, n, rank, width, generator=generator) / 8).to(dtype) for n in (heads, kv_heads)]


def directions(layers, heads, kept=4, width=48):
    rows = torch.randn(layers, heads, width, kept, generator=torch.Generator().manual_seed(1))
    return torch.linalg.qr(rows).Q.mT.contiguous()


class TestItIsStrict:
    @pytest.mark.parametrize(
        "mixes",
        [
            lambda x: x + torch.ones(3),
            lambda x: torch.ones(3)[x.long()],
            lambda x: x[torch.tensor([0, 1])],
            lambda x: x.copy_(torch.ones(3)),
            lambda x: torch.cat([x, torch.ones(3)]),
            lambda x: torch.dot(torch.ones(3), x),
        ],
    )
    def test_both_sides_do_not_mix(self, device, mixes):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mixes(torch.ones(3, device="cuda"))

    def test_numpy_sees_nothing_of_it(self, device):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            torch.ones(3).cuda().numpy()

    @pytest.mark.parametrize(
        "waits",
        [
            lambda x: bool(x.any()),
            lambda x: x.sum().item(),
            lambda x: x.tolist(),
            lambda x: x.cpu(),
            lambda x: x.to("cpu"),
            lambda x: x[x > 0],
            lambda x: x.nonzero(),
            lambda x: torch.linalg.eigh(x.diag()),
            lambda x: torch.equal(x, x),
        ],
    )
    def test_what_waits_is_counted(self, device, waits):
        x = torch.ones(3, device="cuda")
        device.reset()
        waits(x)
        assert device.waits == 1

    def test_what_does_not_wait_is_not(self, device):
        x = torch.ones(3, 3, device="cuda")
        device.reset()
        (x @ x).mul_(2).where(x > 0, 1).diagonal()[1:].view(2)
        assert device.counts() == {"launches": 4, "waits": 0, "copies_in": 0, "copies_out": 0}
        assert device.flops == {(torch.float32, torch.float32): 54}

    def test_memory_ends_and_comes_back(self, device):
        device.memory = 4096
        held = [torch.zeros(512, device="cuda"), torch.zeros(256).cuda()]
        held.append(held[0][:7].view(7))  # takes none
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.cat(held)
        assert device.held == 3072
        del held
        assert device.held == 0
        assert device.peak == 3072

    def test_tf32_is_noticed(self, device, tf32):
        x = torch.ones(3, 3, device="cuda")
        with pytest.raises(AssertionError, match="may take TF32"):
            x @ x

    def test_errors_come_late_and_stay(self, device):
        x = torch.ones(3, device="cuda")
        device.fail(LATE)
        y = x + x  # fails, unnoticed
        for look in (y.cpu, x.tolist, y.sum().item):
            with pytest.raises(type(LATE), match="illegal memory access"):
                look()


@pytest.fixture
def tf32(monkeypatch):
    """A caller that lets float32 products be rounded."""
    matmul = torch.backends.cuda.matmul
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert matmul.allow_tf32
    yield
    assert matmul.allow_tf32  # still
    torch.set_float32_matmul_precision(allowed)


#: What is measured of heads, and of their directions: given the move to a device.
MEASURES = {
    "spectra": lambda q, k, move: spectra.spectra(qk(move(q[0]), move(k[0])), 4),
    "spectra of ov": lambda q, k, move: spectra.spectra(ov(w_v=move(k[0]), w_o=move(q[0])), 4),
    "scores": lambda q, k, move: layer_scores(qk(move(q[0]), move(k[0]))),
    "original": lambda q, k, move: original_quantities(qk(move(q[0]), move(k[0])), 4),
    "products of one set": lambda q, k, move: of_one_set(qk(move(q), move(k))),
    "products of two": lambda q, k, move: inner_products(qk(move(q[:1]), move(k[:1])), qk(move(q[1:]), move(k[1:]))),
    "products in float64": lambda q, k, move: inner_products(qk(move(q[:1]), move(k[:1])), qk(move(q), move(k)), "float64"),
    "composition": lambda q, k, move: composition.scores(composition.reads("q", both(q, k, move)[0]), writers(q, k, move)),
    "channels": lambda q, k, move: composition.channels("k", *both(q, k, move)[::-1], 4),
    "drift": lambda q, k, move: drift.drift(qk(move(q[0]), move(k[0])), qk(move(q[1]), move(k[1]))),
    "span overlaps": lambda q, k, move: span_overlaps(directions(3, q.shape[1]), move(q).device.type),
    "kernels": lambda q, k, move: kernels(spans(move(q[0])), spans(move(k[0]))),
    "energies": lambda q, k, move: frequencies.energies(turned(q, k, move)),
    "at offsets": lambda q, k, move: frequencies.at_offsets(turned(q, k, move), [0, 1, -3]),
    "turning": lambda q, k, move: frequencies.turning(turned(q, k, move), 64),
    "composition over offsets": lambda q, k, move: composition.scores(
        composition.reads("k", both(q, k, move)[0], TURNS), writers(q, k, move)
    ),
    "between tokens": lambda q, k, move: between_tokens(
        qk(move(q[0]), move(k[0])), TokenProducts(*(centred_gram([move(each.flatten(0, 2))]) for each in (q, k, q)))
    ),
}
#: Of heads of the same index: these are looked at one index after the other.
BY_INDEX = {
    "same index": lambda q, k, move: same_index_products(*[qk(move(q), move(k))] * 2, q.shape[1]),
    "overlaps": lambda q, k, move: overlaps(directions(3, q.shape[1]), move(q).device.type),
}
EVERY = MEASURES | BY_INDEX
#: Each measure, and by both routes what consists of inner products.
BOTH_ROUTES = [(name, "products") for name in EVERY] + [(name, "strips") for name in EVERY if "products" in name]


def both(q, k, move):
    """Forms of both circuits."""
    return qk(move(q[0]), move(k[0])), ov(w_v=move(k[1]), w_o=move(q[1]))


def writers(q, k, move):
    return composition.writes(both(q, k, move)[1])


def turned(q, k, move):
    return frequencies.RotaryHeads.of(qk(move(q[0]), move(k[0])), TURNS)


def of_one_set(heads):
    return inner_products(heads, heads)


def values_of(result) -> list[torch.Tensor]:
    """The tensors of a result, on the CPU."""
    if isinstance(result, torch.Tensor):
        return [result.cpu()]
    if isinstance(result, tuple):
        return [torch.as_tensor(value).cpu() for value in result]
    return [value.cpu() for name in fields(result) if isinstance(value := getattr(result, name.name), torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "route"), BOTH_ROUTES, indirect=["route"])
def test_every_byte_is_the_cpus(device, alike, name, route, dtype):
    measure = EVERY[name]
    q, k = weights(2, 6, 2, 8, 48, dtype)
    found, known = measure(q, k, torch.Tensor.cuda), measure(q, k, lambda tensor: tensor)
    assert device.launches
    # Of a wrapped tensor, torch's `svdvals` asks LAPACK for vectors too, which is another routine.
    rounding = 1e-12 if name == "drift" else 0
    for one, other in zip(values_of(found), values_of(known), strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)


@pytest.fixture(params=["products", "strips"])
def route(request, monkeypatch):
    monkeypatch.setattr(inner, "cheapest", lambda *_: request.param)
    return request.param


def counted(device, measure, heads):
    q, k = weights(2, heads, heads // 2, 8, 64)
    q, k = q.cuda(), k.cuda()
    device.reset()
    measure(q, k, lambda tensor: tensor.cuda())
    return device.counts()


@pytest.mark.parametrize(("name", "route"), [each for each in BOTH_ROUTES if each[0] in MEASURES], indirect=["route"])
def test_waits_and_copies_do_not_grow_with_the_heads(device, route, name):
    few, many = (counted(device, MEASURES[name], heads) for heads in (16, 32))
    assert {count: many[count] for count in ("waits", "copies_in", "copies_out")} == {
        count: few[count] for count in ("waits", "copies_in", "copies_out")
    }
    assert many["waits"] <= 18
    if name in ("spectra", "original"):
        assert many["launches"] == few["launches"]


@pytest.mark.parametrize(("name", "most"), [("same index", 2), ("overlaps", 1)])
def test_of_equal_indices_the_device_is_waited_for_once_or_twice_and_nothing_is_copied_to_it(device, name, most):
    few, many = (counted(device, BY_INDEX[name], heads) for heads in (16, 32))
    assert many["copies_in"] == few["copies_in"] <= 1
    assert many["waits"] - few["waits"] == most * 16


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_rounded_to_tf32_even_where_the_caller_lets_it(device, tf32, name):
    EVERY[name](*weights(2, 6, 2, 8, 48), torch.Tensor.cuda)


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (torch.bfloat16, "auto", (torch.bfloat16, torch.float32)),
        (torch.float16, "auto", (torch.float32, torch.float32)),
        (torch.float32, "auto", (torch.float32, torch.float32)),
        (torch.bfloat16, "float64", (torch.float64, torch.float64)),
    ],
)
def test_products_are_taken_where_they_were_meant(device, route, dtype, precision, expected):
    q, k = weights(4, 6, 2, 8, 48, dtype)
    heads = qk(q.cuda(), k.cuda())
    routes.longest_sum(heads.device)
    device.reset()
    inner_products(heads, heads, precision)
    taken = device.flops.total()
    # Of strips, products of the forms are float32 like the forms.
    assert sum(flops for kinds, flops in device.flops.items() if kinds[1] == expected[1]) == taken
    assert device.flops[expected] > (0 if route == "strips" else 0.99 * taken)


@pytest.mark.parametrize("name", ["spectra", "original", "products of one set", "products of two"])
def test_where_memory_runs_out_half_as_many_heads_are_measured(device, monkeypatch, caplog, name):
    monkeypatch.setattr(inner, "cheapest", lambda *_: "products")
    q, k = (each.cuda() for each in weights(2, 16, 8, 8, 64))
    device.reset()
    whole = values_of(MEASURES[name](q, k, torch.Tensor.cuda))
    before = device.held
    device.memory = before + (device.peak - before) * 3 // 4
    halved = values_of(MEASURES[name](q, k, torch.Tensor.cuda))
    assert "memory ran out with " in caplog.text
    assert device.released
    assert device.held == before
    for one, other in zip(halved, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_where_memory_does_not_suffice_for_one_head_it_is_said(device):
    q, k = (each[0].cuda() for each in weights(1, 4, 2, 8, 64))
    device.memory = device.held + 4096
    with pytest.raises(HeadgramError, match="There is too little memory for one head"):
        headgram.spectrum(q, k)


@pytest.fixture
def job(tmp_path):
    """Runs a stage on a device, and gives the files that it wrote."""
    extract = Recipe("extract", "{}", "f", "c")
    path = tmp_path / "layers-000-004.pt"
    write_factors(path, range(5), dict(zip(("query", "key"), weights(5, 6, 2, 8, 48, torch.bfloat16), strict=True)))
    seal(record_of(path), Provenance(extract, "m", "self", "qk"), [path])

    def run(stage, device):
        folder = tmp_path / stage / device
        folder.mkdir(parents=True)
        provenance = Provenance(Recipe(stage, "{}", "f", "c", (extract.key,)), "m", "self", "qk", device)
        if stage == "eigen":
            measure_shard(folder / "table.parquet", folder / "directions.pt", [path], range(5), Config(), provenance)
        else:
            tiles = [[0, 1, 2], [3, 4]]
            measure_row(folder / "table.parquet", [path], tiles, stage == "pairs", Config().gram, provenance)
        return folder

    return run


@pytest.mark.parametrize("stage", ["eigen", "pairs", "same index"])
def test_what_a_job_writes_is_what_it_writes_on_the_cpu(device, alike, job, stage):
    found, known = (job(stage, where) for where in ("cuda", "cpu"))
    assert json.loads((found / "table.json").read_text())["device"] == "cuda"
    assert device.copies_in
    one, other = (read_table(folder / "table.parquet").replace_schema_metadata(None) for folder in (found, known))
    assert one.equals(other)
    if stage == "eigen":
        one, other = (torch.load(folder / "directions.pt", weights_only=True) for folder in (found, known))
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


@pytest.mark.parametrize("stage", ["eigen", "pairs", "same index"])
@pytest.mark.parametrize("after", [1, 40])
def test_a_late_error_ends_the_job_and_nothing_is_written(device, job, stage, after, tmp_path, caplog):
    device.fail(LATE, after)
    with pytest.raises(type(LATE), match="illegal memory access"):
        job(stage, "cuda")
    assert list((tmp_path / stage / "cuda").iterdir()) == []
    assert "memory ran out" not in caplog.text


def test_everything_that_is_measured_was_compared():
    q, k = weights(2, 6, 2, 8, 48)
    assert len(values_of(MEASURES["spectra"](q, k, lambda tensor: tensor))) == len(fields(Spectrum))
