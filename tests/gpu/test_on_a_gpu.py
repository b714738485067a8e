"""What a GPU measures is what the CPU measures: run with `make test-gpu`."""

import warnings

import numpy as np
import pytest
import torch

import headgram
from headgram.forms.circuits import qk
from headgram.geometry import eigen, inner, spectra
from headgram.geometry.neighbours import span_overlaps
from headgram.geometry.overlaps import overlaps
from headgram.geometry.projections import projections
from headgram.geometry.scores import layer_scores
from headgram.results.factors import write_factors
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.results.tables import read_table
from headgram.stages.composition import Composed, compose
from headgram.stages.eigen import measure_shard
from headgram.stages.extracted import ExtractedModel
from headgram.stages.gram import measure_row
from headgram.study.options import Config
from same_index import pair_products

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: Heads, key heads, rank, width: grouped, unevenly grouped, one key head, wide ranks, as in real models.
SHAPES = [(9, 3, 64, 576), (7, 3, 16, 96), (8, 1, 32, 256), (4, 4, 40, 64), (32, 8, 128, 2560)]


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def crowd():
    """Heads, rank, width, and bytes in which not all of them are measured at once."""
    return 64, 128, 4096, 900 * 2**20


def weights(layers, heads, kv_heads, rank, hidden, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(layers, n, rank, hidden, generator=generator) / 8 for n in (heads, kv_heads))
    return q.to(dtype), k.to(dtype)


def flawed(dtype):
    """A zero head, dependent rows, a symmetric form, a form of rank one."""
    q, k = (each[0] for each in weights(1, 6, 6, 16, 96, dtype))
    q[0], q[1, 1], k[2], k[3, 1:] = 0, q[1, 0], q[2], 0
    return q, k


def assert_same_spectra(found, known):
    size = known.spectral_norm[:, None].where(known.spectral_norm[:, None] > 0, 1)
    for name in ("singular_values", "symmetric_eigenvalues"):
        assert ((getattr(found, name).cpu() - getattr(known, name)).abs() / size).max() < 1e-12
    for name in ("fro_sq", "self_overlap", "effective_rank", "symmetry", "positive_energy", "directionality"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(known, name), rtol=1e-9, atol=1e-9)
    assert (found.residual < 1e-12).all()


def test_spectra(shape, dtype):
    q, k = (each[0] for each in weights(1, *shape, dtype))
    found, known = headgram.spectrum(q.cuda(), k.cuda()), headgram.spectrum(q, k)
    assert_same_spectra(found, known)
    for name in ("right", "left", "signed"):
        cosines = (getattr(found, name).cpu() * getattr(known, name)).sum(-1)
        assert cosines.min() > 1 - 1e-6, name


def test_spectra_of_degenerate_forms(dtype):
    q, k = flawed(dtype)
    assert_same_spectra(headgram.spectrum(q.cuda(), k.cuda()), headgram.spectrum(q, k))


@pytest.mark.parametrize("route", ["products", "strips"])
@pytest.mark.parametrize("same", [True, False])
def test_inner_products(monkeypatch, route, dtype, shape, same):
    monkeypatch.setattr(inner, "cheapest", lambda *_: route)
    a = weights(5, *shape, dtype)
    b = a if same else weights(4, *shape, dtype, seed=1)
    known = pair_products(*a, *b)
    a = [each.cuda() for each in a]
    b = a if same else [each.cuda() for each in b]
    for precision, tolerance in (("auto", 1e-6), ("float64", 1e-12)):
        found = pair_products(*a, *b, precision)
        norms = [pair_products(*each, *each).gram.diagonal().T.sqrt() for each in (a, b)]
        bound = tolerance * (norms[0][:, None] * norms[1]).cpu()
        for name in ("gram", "transposed"):
            assert ((getattr(found, name).cpu() - getattr(known, name)).abs() <= bound).all()
        assert found.exact.all() == (precision == "float64" or dtype == torch.float64)


def test_forms_much_smaller_than_their_weights_are_measured_in_float64():
    q, k = weights(3, 4, 2, 16, 96, torch.bfloat16)
    q[1, 2, 1::2], k[1, 1, 1::2] = q[1, 2, ::2], -k[1, 1, ::2]
    found = pair_products(q.cuda(), k.cuda(), q.cuda(), k.cuda(), "auto")
    known = pair_products(q, k, q, k)
    assert found.exact.tolist() == [False, False, True, False]
    for of_small, known_of_small in ((found.gram.cpu()[1], known.gram[1]), (found.gram.cpu()[:, 1], known.gram[:, 1])):
        torch.testing.assert_close(of_small[:, 2], known_of_small[:, 2], rtol=1e-10, atol=1e-10)


def test_scores_overlaps_and_neighbours():
    q, k = (each[0] for each in weights(1, 9, 3, 64, 1200, torch.bfloat16))
    assert layer_scores(qk(q.cuda(), k.cuda())) == pytest.approx(layer_scores(qk(q, k)), abs=1e-9)
    directions = [torch.linalg.qr(torch.randn(6, 5, 64, 8)).Q.mT for _ in range(3)]
    torch.testing.assert_close(overlaps(directions[0], "cuda"), overlaps(directions[0]))
    found, known = (span_overlaps(directions[0], device) for device in ("cuda", "cpu"))
    torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-5)


def test_a_shard_and_a_row_are_those_of_the_cpu(tmp_path):
    q, k = weights(6, 8, 4, 32, 256, torch.bfloat16)
    extract = Recipe("extract", "{}", "f", "c")
    path = tmp_path / "layers-000-005.pt"
    write_factors(path, range(6), {"query": q, "key": k})
    seal(record_of(path), Provenance(extract, "m", "self", "qk"), [path])
    options = Config()
    tables, tensors = {}, {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        for stage in ("eigen", "gram"):
            provenance = Provenance(Recipe(stage, "{}", "f", "c", (extract.key,)), "m", "self", "qk", device)
            (folder / stage).mkdir(parents=True)
            table = folder / stage / "table.parquet"
            if stage == "eigen":
                measure_shard(table, folder / "directions.pt", [path], range(6), options, provenance)
            else:
                measure_row(table, [path], [[0, 1, 2, 3], [4, 5]], True, options.gram, provenance)
            tables[device, stage] = read_table(table).to_pandas()
        tensors[device] = torch.load(folder / "directions.pt", weights_only=True)
    for stage in ("eigen", "gram"):
        found, known = tables["cuda", stage], tables["cpu", stage]
        assert list(found) == list(known)
        for name in known.columns.difference(["residual"]):
            one, other = (torch.tensor(np.stack(frame[name]).astype(float)) for frame in (found, known))
            most = float(other.nan_to_num().abs().max() + 1)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * most, equal_nan=True)
    for name in ("right", "left", "signed"):
        assert (tensors["cuda"][name] * tensors["cpu"][name]).sum(-1).min() > 0.999
    assert (tensors["cuda"]["original_eig_dirs"] * tensors["cpu"]["original_eig_dirs"]).sum(-1).abs().min() > 0.999


def test_compositions_and_projections_are_those_of_the_cpu(tmp_path):
    files, keys = {"self": {}}, []
    for circuit, roles, seed in (("qk", ("query", "key"), 0), ("ov", ("output", "value"), 1)):
        extract = Recipe("extract", "{}", circuit, "c")
        keys.append(extract.key)
        path = tmp_path / circuit / "layers-000-003.pt"
        write_factors(path, range(4), dict(zip(roles, weights(4, 8, 4, 16, 96, torch.bfloat16, seed=seed), strict=True)))
        seal(record_of(path), Provenance(extract, "m", "self", circuit), [path])
        files["self"][circuit] = [path]
    tables = {}
    for device in ("cpu", "cuda"):
        names = ("composition.parquet", "channels.parquet", "kernels.parquet", "directions.pt", "record.json")
        composed = Composed(*(tmp_path / device / name for name in names))
        provenance = Provenance(Recipe("composition", "{}", "f", "c", tuple(keys)), "m", None, device=device)
        compose(ExtractedModel(files, dict(zip(("qk", "ov"), keys, strict=True)), {}), composed, Config(), provenance)
        tables[device] = [read_table(path).to_pandas() for path in (composed.composition, composed.channels, composed.kernels)]
    for found, known in zip(tables["cuda"], tables["cpu"], strict=True):
        place = ["stack", "kind", "writer", "role_a", "role_b", "layer_a", "head_a", "layer_b", "head_b"]
        place = [name for name in place if name in known]  # equally strong pairs may change places
        numbers = known.columns.difference([*place, "place"])
        one, other = (frame.set_index(place)[numbers].sort_index() for frame in (found, known))
        assert one.index.equals(other.index)
        one, other = (torch.tensor(frame.to_numpy(dtype=float)) for frame in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)

    directions = torch.nn.functional.normalize(torch.randn(30, 64, generator=torch.Generator().manual_seed(2)), dim=1)
    rows = torch.randn(500, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    found, known = (
        projections(directions.to(device), [each.to(device) for each in rows.split(99)], 4) for device in ("cuda", "cpu")
    )
    for name in ("values", "deviations", "share"):
        torch.testing.assert_close(getattr(found, name), getattr(known, name), rtol=1e-4, atol=1e-5)


def test_where_memory_runs_out_half_as_many_heads_are_measured(caplog, crowd):
    count, rank, width, memory = crowd
    q, k = (each[0] for each in weights(1, count, count, rank, width, torch.bfloat16))
    known = headgram.spectrum(q[:2], k[:2])
    q, k = q.cuda(), k.cuda()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + memory) / total)
        found = headgram.spectrum(q, k)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert f"memory ran out with {count} heads at once" in caplog.text
    torch.testing.assert_close(found.singular_values[:2].cpu(), known.singular_values, rtol=1e-10, atol=1e-10)


def test_solutions_that_do_not_hold_are_computed_by_the_cpu(monkeypatch, caplog):
    q, k = (each[0].cuda() for each in weights(1, 8, 4, 32, 256, torch.float32))
    known = headgram.spectrum(q, k)
    solver = eigen._batched_eigh

    def faulty(matrices):
        values, vectors = solver(matrices)
        return values, vectors.index_fill(0, torch.tensor([1], device="cuda"), 0)

    monkeypatch.setattr(eigen, "_batched_eigh", faulty)
    found = headgram.spectrum(q, k)
    assert "1 of 8 eigenproblems" in caplog.text
    torch.testing.assert_close(found.singular_values, known.singular_values, rtol=1e-11, atol=1e-11)
    assert (found.residual < 1e-12).all()


def test_the_device_is_waited_for_once_a_batch_not_once_a_head():
    def waits(count):
        q, k = (each[0].cuda() for each in weights(1, count, count, 16, 96, torch.float32))
        spectra._measure_block(q.double(), k.double(), 8)  # the first call of a routine waits more often
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                spectra._measure_block(q.double(), k.double(), 8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len(caught)

    assert waits(64) == waits(4)
