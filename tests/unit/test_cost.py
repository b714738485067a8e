"""What a plan costs on paper, against what a pretended GPU counts, and what the documentation says."""

import functools
import time
from collections import Counter
from itertools import combinations_with_replacement, product
from pathlib import Path

import pytest
import torch
from locked import locked_llama
from typer.testing import CliRunner

from headgram.cli import app
from headgram.forms.heads import Heads
from headgram.forms.reading import Frame, Frames, Norm, Rotary
from headgram.geometry import costs as prices
from headgram.geometry import inner, routes
from headgram.results.around import write_around
from headgram.results.factors import FactorFiles, write_factors
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.results.tables import SIDES
from headgram.stages.composition import Composed, compose
from headgram.stages.eigen import measure_shard
from headgram.stages.extracted import ExtractedModel
from headgram.stages.gram import measure_row
from headgram.stages.lineage import Measured, measure
from headgram.stages.rotary import Turned, measure_rotary
from headgram.study.cost import GPUS, costs, table
from headgram.study.lock import lock_path, write_lock
from headgram.study.manifest import Labels
from headgram.study.options import load_config
from headgram.study.plan import make_plan
from stand_in import StandIn

ROOT = Path(__file__).parents[2]
SHAPES = {
    "Qwen3-4B": {"layers": 36, "heads": 32, "kv_heads": 8, "rank": 128, "hidden": 2560},
    "Llama-3.1-70B": {"layers": 80, "heads": 64, "kv_heads": 8, "rank": 128, "hidden": 8192},
    "Llama-3.1-405B": {"layers": 126, "heads": 128, "kv_heads": 8, "rank": 128, "hidden": 16384},
}
SMALL = {"layers": 4, "heads": 6, "kv_heads": 3, "rank": 8, "hidden": 512}


def planned(shape, circuits=("qk",), **options):
    config = load_config({"circuits": list(circuits)} | options)
    return make_plan({"m": locked_llama(**shape)}, config, ROOT / "workflow" / "scripts")


@pytest.mark.parametrize(
    ("pairs", "block", "per_tile"),
    [("all", 2**30, 4), ("all", 2 * 6 * 4 * 8 * 512, 4), ("all", 4 * 4 * 8 * 512, 2), ("same", 2**30, 2)],
    ids=["one block", "two layers in a block", "four heads in a block", "same index"],
)
def test_a_gpu_is_given_as_many_bytes_and_multiplies_as_much_as_the_plan_says(tmp_path, monkeypatch, pairs, block, per_tile):
    monkeypatch.setitem(prices.BLOCK_BYTES, "cuda", block)
    for module in (routes, inner):
        monkeypatch.setattr(module, "longest_sum", lambda _: 2**14)  # not measured
    config = {"gram": {"pairs": pairs, "layers_per_tile": per_tile}}
    plan = planned(SMALL, **config)
    heads, work = plan.models["m"].heads["qk", "self"], costs(plan)
    extract = Recipe("extract", "{}", "f", "c")
    path = tmp_path / "layers.pt"
    q, k = (torch.randn(4, n, 8, 512, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (6, 3))
    write_factors(path, range(4), {"query": q, "key": k})
    seal(record_of(path), Provenance(extract, "m", "self", "qk"), [path])

    def provenance(stage):
        return Provenance(Recipe(stage, "{}", "f", "c", (extract.key,)), "m", "self", "qk", "cuda")

    with StandIn() as device:
        for row in heads.rows:
            tiles = heads.row(row)
            measure_row(tmp_path / f"{row}.parquet", [path], tiles, pairs == "all", plan.config.gram, provenance("gram"))
        assert device.bytes_in == pytest.approx(work["gram"].copied, rel=0.03)  # and the maps from heads to factors
        assert device.flops[torch.bfloat16, torch.float32] == pytest.approx(work["gram"].flops["bfloat16"], rel=0.25)
        assert device.launches == pytest.approx(work["gram"].launches, rel=0.1)
        device.reset()
        measure_shard(tmp_path / "eigen.parquet", tmp_path / "d.pt", [path], range(4), plan.config, provenance("eigen"))
        assert device.bytes_in == pytest.approx(work["eigen"].copied, rel=0.03)
        assert device.launches == pytest.approx(work["eigen"].launches, rel=0.1)


@pytest.mark.parametrize("block", [2**30, 2 * 6 * 4 * 8 * 512], ids=["one block", "two layers in a block"])
def test_compositions_and_turns_are_what_the_plan_says(tmp_path, monkeypatch, block):
    monkeypatch.setitem(prices.BLOCK_BYTES, "cuda", block)
    plan = planned(SMALL, ("qk", "ov"), composition={"enabled": True, "strongest": 3})
    work, chance = costs(plan), torch.Generator().manual_seed(0)
    files, keys = {}, {}
    for circuit, roles in (("qk", ("query", "key")), ("ov", ("output", "value"))):
        path, extract = tmp_path / f"{circuit}.pt", Recipe("extract", "{}", circuit, "c")
        weights = {role: torch.randn(4, n, 8, 512, generator=chance).bfloat16() for role, n in zip(roles, (6, 3), strict=True)}
        write_factors(path, range(4), weights)
        seal(record_of(path), Provenance(extract, "m", "self", circuit), [path])
        files[circuit], keys[circuit] = [path], extract.key
    waves = Rotary(torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64), interleaved=False)
    norm = Norm(centred=False, gain=torch.rand(512, generator=chance, dtype=torch.float64) + 0.5)
    frames = {"self": Frames({layer: Frame(norm=norm, source_norm=norm, rotary=waves) for layer in range(4)}, context=2**10)}
    around = tmp_path / "around.pt"
    recipe = Recipe("around", "{}", "f", "c")
    write_around(around, frames)
    seal(record_of(around), Provenance(recipe, "m", None), [around])

    def provenance(stage, upstream):
        return Provenance(Recipe(stage, "{}", "f", "c", upstream), "m", None, None, "cuda")

    with StandIn() as device:
        composed = Composed(*(tmp_path / name for name in ("a", "b", "c", "d", "e.json")))
        compose(
            ExtractedModel({"self": files}, keys, frames), composed, plan.config, provenance("composition", tuple(keys.values()))
        )
        counted = {str(of).removeprefix("torch."): flops for (of, _), flops in device.flops.items()}
        assert device.bytes_in == pytest.approx(work["composition"].copied, rel=0.1)
        assert counted["float32"] == pytest.approx(work["composition"].flops["float32"], rel=0.1)
        assert device.launches == pytest.approx(work["composition"].launches, rel=0.1)
        assert 0.8 < counted["float64"] / work["composition"].flops["float64"] < 1  # without what is factored
        device.reset()
        turned = Turned(*(tmp_path / name for name in ("f", "g", "h", "i.json")))
        measure_rotary(
            (around, record_of(around)),
            {"self": files["qk"]},
            turned,
            plan.config,
            provenance("rotary", (keys["qk"], recipe.key)),
        )
        assert device.bytes_in == pytest.approx(work["rotary"].copied, rel=0.1)
        assert device.flops[torch.float64, torch.float64] == pytest.approx(work["rotary"].flops["float64"])
        assert device.launches == pytest.approx(work["rotary"].launches, rel=0.1)


@pytest.mark.parametrize("block", [2**30, 2 * 6 * 4 * 8 * 512, 4 * 4 * 8 * 512], ids=["one", "two layers", "four heads"])
@pytest.mark.parametrize("pairs", ["all", "same"])
def test_comparisons_of_two_models_are_what_the_plan_says(tmp_path, monkeypatch, pairs, block):
    monkeypatch.setitem(prices.BLOCK_BYTES, "cuda", block)
    for module in (routes, inner):
        monkeypatch.setattr(module, "longest_sum", lambda _: 2**14)  # not measured
    work = costs(lineage_of(SMALL, {"circuits": ["qk"], "gram": {"pairs": pairs}}))["lineage"]
    extract, sides = Recipe("extract", "{}", "f", "c"), []
    for step in range(2):
        path = tmp_path / f"{step}.pt"
        chance = torch.Generator().manual_seed(step)
        q, k = (torch.randn(4, n, 8, 512, generator=chance).bfloat16() for n in (6, 3))
        write_factors(path, range(4), {"query": q, "key": k})
        seal(record_of(path), Provenance(extract, "m", "self", "qk"), [path])
        layer = {side: torch.linalg.qr(torch.randn(6, 512, 4, generator=chance))[0].mT for side in SIDES}
        sides.append(Measured(FactorFiles([path], extract.key, "qk"), [layer] * 4))

    with StandIn() as device:
        measure(("qk", "self"), *sides, pairs == "all", "cuda")
        assert work.jobs == 1
        assert device.bytes_in == pytest.approx(work.copied, rel=0.03)  # and the maps from heads to factors
        assert device.flops[torch.bfloat16, torch.float32] == pytest.approx(work.flops["bfloat16"], rel=0.25)
        assert device.launches == pytest.approx(work.launches, rel=0.1)
        assert 0.1 < device.flops[torch.float64, torch.float64] / work.flops["float64"] < 1  # without what is factored


@pytest.mark.parametrize("side", [256, 96], ids=["one strip", "strips"])
@pytest.mark.parametrize("count", [12, 144])
@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("same", [True, False], ids=["one set", "two"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "any"])
@pytest.mark.parametrize("route", ["products", "strips"])
def test_a_gpu_is_told_as_many_kernels_as_the_routes_say(monkeypatch, route, symmetric, same, exact, count, side):
    vectors = count * (1 if symmetric else 2) * (1 if same else 2)
    monkeypatch.setitem(prices.STRIP_BYTES, "cuda", (8 if exact else 4) * vectors * side**2)  # of `routes`, too
    monkeypatch.setattr(inner, "cheapest", lambda *_: route)
    chance = torch.Generator().manual_seed(0)

    def heads():
        a, b = (torch.randn(count, 4, 256, generator=chance) for _ in range(2))
        places = torch.arange(count)
        return Heads.symmetric(a) if symmetric else Heads(a, b, places, places)

    with StandIn() as device:
        x, y = (heads().to("cuda") for _ in range(2))
        device.reset()
        inner.inner_products(x, x if same else y, "float64" if exact else "auto")
        assert device.launches == pytest.approx(
            prices.launches(route, inner.sizes_of(x, x if same else y), prices.GPU.longest, exact), rel=0.15
        )


@functools.cache
def counted(name, pairs, budget, circuits=("qk",)):
    """The plan of a shape, and its costs, which take seconds to count for a hundred thousand pairs of blocks."""
    plan = planned(SHAPES[name], circuits, gram={"pairs": pairs}, memory_budget=budget)
    return plan, costs(plan)


def test_seconds_are_those_of_what_takes_longest():
    work = costs(planned(SHAPES["Qwen3-4B"]))["eigen"]
    h100, h200, a100, l4 = (work.seconds(gpu) for gpu in GPUS)
    assert h100 == h200 < a100 < l4  # bound by float64, of which an L4 has next to none
    assert l4 == pytest.approx(work.flops["float64"] / 0.47e12, rel=0.05)
    work.memory = 1e15
    assert work.seconds(GPUS[0]) == pytest.approx(1e15 / 3.35e12 + work.copied / 64e9)


def test_a_part_more_doubles_what_is_counted():
    one = costs(planned(SMALL))
    plan = make_plan({name: locked_llama(name, **SMALL) for name in "ab"}, planned(SMALL).config, ROOT / "workflow" / "scripts")
    for stage, work in costs(plan).items():
        assert work.jobs == 2 * one[stage].jobs
        assert work.flops == {kind: 2 * count for kind, count in one[stage].flops.items()}
        assert work.copies == one[stage].copies


@pytest.mark.parametrize(
    ("name", "pairs"), [("Qwen3-4B", "auto"), ("Llama-3.1-405B", "auto"), ("Llama-3.1-70B", "all"), ("Llama-3.1-405B", "all")]
)
def test_the_documentation_says_what_is_counted(name, pairs):
    assert table(counted(name, pairs, "2 GiB", ("qk", "ov"))[1]) in (ROOT / "docs" / "scaling.md").read_text()


def test_the_documentation_says_what_a_lineage_costs():
    found = costs(lineage_of(SHAPES["Qwen3-4B"], {}))
    assert table({"lineage": found["lineage"]}) in (ROOT / "docs" / "scaling.md").read_text()


def lineage_of(shape, options):
    """The plan of two models of one training."""
    entries = {name: locked_llama(**shape) for name in ("old", "new")}
    labels = {name: Labels("training", step) for step, name in enumerate(entries)}
    return make_plan(entries, load_config(options), ROOT / "workflow" / "scripts", labels)


@pytest.mark.parametrize(("name", "count", "budget"), [("Llama-3.1-70B", 5120, "512 MiB"), ("Llama-3.1-405B", 16128, "2 GiB")])
def test_all_pairs_of_thousands_of_heads_are_cut_into_jobs_within_the_budget(name, count, budget):
    plan, work = counted(name, "all", budget)
    heads = plan.models["m"].heads["qk", "self"]
    assert heads.all_pairs
    assert heads.stack.heads * len(heads.stack.layers) == count
    assert len(heads.rows) > 16
    largest = max(map(len, heads.tiles)) * heads.stack.heads
    blocks = 2 * prices.BLOCK_BYTES["cpu"]  # of both sides, in float32
    results = (2 * 8 + 1 + 2 * 8 + 4 * 4) * largest**2  # products, which are wanted, their places, and columns of the tile
    assert blocks + results < plan.config.memory_budget
    work = work["gram"]
    assert work.jobs == len(heads.rows)
    rank, width = heads.locked.rank, heads.stack.hidden
    products = (
        count**2 / 2 * 2 * (1 + 1 / 8) ** 2 * 2 * rank**2 * width
    )  # both inner products, shared keys once for eight or sixteen
    assert 0.2 * products < sum(work.flops.values()) < 1.2 * products
    assert work.distinct == len(heads.stack.layers) * (heads.stack.heads + heads.stack.kv_heads) * rank * width * 2


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("size", range(1, 5))
def test_runs_and_their_pairs_are_counted_by_their_lengths(count, size):
    cut = [range(start, min(start + size, count)) for start in range(0, count, size)]
    assert prices.block_lengths(count, size) == Counter(map(len, cut))
    met = Counter((len(one), len(other), one == other) for one, other in combinations_with_replacement(cut, 2))
    assert prices.pairs_of(prices.block_lengths(count, size)) == met  # the last run alone is shorter, and never the first of two


@pytest.mark.parametrize("most", range(1, 14))
def test_blocks_are_counted_by_their_heads(most):
    for layers, heads in product(range(1, 6), range(1, 6)):
        found = Counter(len(some) * len(each) for some, each in prices.blocks(range(layers), heads, 8, 16, most * 4 * 8 * 16))
        assert prices.block_sizes(layers, heads, 8, 16, most * 4 * 8 * 16) == found


@pytest.mark.parametrize("count", ["layers", "heads", "kv_heads", "rank", "hidden"])
def test_the_largest_counts_that_a_lock_may_state_take_no_time(count):
    """`headgram plan --cost` on a lock that somebody edited."""
    most = 10_000 if count == "layers" else 2**24
    shape = SMALL | {count: most} | ({"heads": most} if count == "kv_heads" else {})
    plan = planned(shape, ("qk", "ov"), gram={"pairs": "same"}, composition={"enabled": True})
    began = time.process_time()
    work = costs(plan)
    assert work["gram"].flops["bfloat16"] > 0
    assert work["composition"].flops["float32"] > 0
    assert time.process_time() - began < 10


def test_the_command_line_says_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = tmp_path / "config" / "models.tsv"
    manifest.parent.mkdir()
    manifest.write_text("name\tsource\nm\tmodels/m\n")
    write_lock(lock_path(manifest), {"m": locked_llama()})
    found = CliRunner().invoke(app, ["plan", "--cost"], catch_exceptions=False)
    assert found.output.startswith("1 models, ")
    assert "| eigen | " in found.output
