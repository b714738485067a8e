"""The plan: what is cut into which jobs, and what each job's recipe holds."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from locked import locked_llama

from headgram.errors import HeadgramError
from headgram.forms.variants import Variant
from headgram.study import jobs
from headgram.study import plan as study_plan
from headgram.study.keys import modules_of
from headgram.study.lineages import misfits
from headgram.study.lock import LockedFile
from headgram.study.manifest import Labels, Row
from headgram.study.options import Config, load_config
from headgram.study.plan import make_plan

SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"


def heads_plan(config=None, **shape):
    return make_plan({"m": locked_llama(**shape)}, config or Config(), SCRIPTS).models["m"].heads["qk", "self"]


@settings(max_examples=30)
@given(
    st.integers(1, 200),
    st.sampled_from([(9, 3, 64, 576), (64, 8, 128, 8192), (128, 8, 128, 16384), (1, 1, 1, 1)]),
    st.sampled_from(["64 MiB", "2 GiB", "100 GiB"]),
)
def test_every_layer_and_every_pair_is_measured_once(layers, shape, budget):
    heads, kv_heads, rank, hidden = shape
    plan = heads_plan(
        load_config({"memory_budget": budget}), layers=layers, heads=heads, kv_heads=kv_heads, rank=rank, hidden=hidden
    )
    everything = list(range(layers))
    for runs in (plan.groups.values(), plan.shards.values(), plan.tiles):
        assert [layer for run in runs for layer in run] == everything
    pairs = [
        (a, b) for row in plan.rows for other in plan.row(row) for a, b in itertools.product(plan.row(row)[0], other) if a <= b
    ]
    assert sorted(pairs) == [(a, b) for a in everything for b in everything if a <= b]
    for shard in plan.shards.values():
        assert {layer for group in plan.groups_of(shard) for layer in plan.groups[group]} >= set(shard)


def test_small_models_take_one_job_per_stage_and_large_ones_fit_the_budget():
    small = heads_plan()
    assert (len(small.groups), len(small.shards), len(small.tiles)) == (1, 1, 1)
    large = heads_plan(layers=126, heads=128, kv_heads=8, rank=128, hidden=16384)
    head_bytes = 2 * 128 * 16384 * (2 + 4)  # W_Q and W_K of one head and layer, as stored and in float32
    assert max(len(tile) for tile in large.tiles) * head_bytes * 2 <= 2**30 + 2 * head_bytes
    assert len(large.shards) == 126


def test_given_sizes_are_kept():
    config = load_config({"eigen": {"layers_per_job": 7}, "gram": {"layers_per_tile": 4}})
    plan = heads_plan(config)
    assert max(map(len, plan.shards.values())) <= 7
    assert max(map(len, plan.tiles)) <= 4


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"eigen": {"topk": 4}}, {"eigen", "merge", "derive", "render"}),
        ({"gram": {"layers_per_tile": 4}}, {"gram", "merge", "derive", "render"}),
        ({"gram": {"precision": "float64"}}, {"gram", "merge", "derive", "render"}),
        ({"original": {"enabled": False}}, {"eigen", "merge", "derive", "render"}),
        ({"weights": {"dtype": "float32"}}, {"extract", "eigen", "gram", "merge", "derive", "render", "composition", "rotary"}),
        ({"composition": {"strongest": 8}}, {"composition", "render"}),
        ({"export": {"compression": "none"}}, {"merge", "derive", "render", "composition", "rotary"}),
        ({"device": "cpu", "memory_budget": "1 GiB", "results": "r", "manifest": "m.tsv"}, set()),
    ],
)
def test_keys_follow_the_contract(change, stages):
    before, after = (make_plan({"m": locked_llama()}, load_config(raw), SCRIPTS).models["m"].recipes for raw in ({}, change))
    changed = {stage for stage in before if before[stage].key != after[stage].key}
    assert {stage for stage, circuit in changed if circuit != "ov"} == stages
    without = {"eigen"} if "original" in change else set()  # the original script knows no other circuit
    assert {stage for stage, circuit in changed if circuit != "qk"} == stages - without


@pytest.mark.parametrize("circuits", [["qk"], ["ov"], ["ov", "qk"]])
def test_a_circuit_makes_nothing_of_another_stale(circuits):
    both, some = (make_plan({"m": locked_llama()}, load_config(raw), SCRIPTS).models["m"] for raw in ({}, {"circuits": circuits}))
    assert some.circuits == circuits
    assert {place[0] for place in some.heads} == set(circuits)
    measured = {(stage, circuit) for stage in ("extract", "eigen", "gram") for circuit in circuits}
    assert {place for place in some.recipes if place[1]} == measured
    assert all(some.recipes[place] == both.recipes[place] for place in measured)
    assert some.recipes["merge", ""] != both.recipes["merge", ""]


def test_compositions_need_both_circuits_and_are_left_out_where_they_cost_too_much(monkeypatch):
    def plan(**raw):
        return make_plan({"m": locked_llama()}, load_config(raw), SCRIPTS)

    record = "provenance/composition/m.json"
    assert plan().models["m"].composed == ("self",)
    assert record in plan().records()
    for without in (plan(circuits=["ov"]), plan(composition={"enabled": False})):
        assert without.models["m"].composed == ()
        assert record not in without.records()
        assert study_plan.left_out(without) == []
    for module in (study_plan, jobs):
        monkeypatch.setattr(module, "MOST_PAIR_FLOPS", 1.0)
    assert plan(composition={"enabled": True}).models["m"].composed == ("self",)
    costly = plan(gram={"pairs": "same"})
    assert costly.models["m"].composed == ()
    (sentence,) = study_plan.left_out(costly)
    assert sentence.startswith("m, stack self: without composition, which would cost more than 1e+00 operations")


def test_folded_forms_and_offsets_are_further_forms_and_make_no_other_stale():
    asked = {"weights": {"norm": ["raw", "folded"]}, "rotary": {"offsets": [0, -1, 64]}}
    before, after = (make_plan({"m": locked_llama()}, load_config(raw), SCRIPTS) for raw in ({}, asked))
    names = ["qk", "qk@-1", "qk@64", "qk-folded", "qk-folded@-1", "qk-folded@64", "ov", "ov-folded"]
    assert after.models["m"].circuits == names
    assert before.models["m"].circuits == ["qk", "ov"]
    assert before.models["m"].extracted.keys() == after.models["m"].extracted.keys() == {("qk", "self"), ("ov", "self")}
    kept = {record: key for record, key in before.records().items() if "provenance" not in record and "report" not in record}
    assert kept.items() <= after.records().items()
    keys = [after.models["m"].recipes["eigen", name].key for name in names]
    assert len(set(keys)) == len(names)
    assert study_plan.left_out(after) == []
    assert [Variant.of(name).name for name in names] == names
    for (stage, name), recipe in after.models["m"].recipes.items():  # as `headgram verify` holds records against the lock
        locked = locked_llama().fingerprint_of(Variant.of(name).circuit) if name else locked_llama().fingerprint
        assert recipe.fingerprint == locked, (stage, name)


@pytest.mark.parametrize(
    ("around", "config", "forms", "sentences"),
    [
        (
            None,
            {"weights": {"norm": "folded"}},
            ["qk", "ov"],
            ["does not pin", "without qk-folded: its", "without ov-folded: its"],
        ),
        (None, {}, ["qk", "ov"], ["m: its lock does not pin the norms, .* `headgram lock --upgrade m` pins them"]),
        (
            {"turns": False},
            {"rotary": {"offsets": [0, 8, 9]}},
            ["qk", "ov"],
            ["m, stack self: without qk@8, qk@9: no rotary encoding turns its queries and keys$"],
        ),
        (
            {"turns": False},
            {"rotary": {"offsets": [8]}},
            ["qk", "ov"],
            ["m, stack self: without qk@8: no rotary encoding turns its queries and keys; qk is measured instead"],
        ),
        (
            {"missing": {"query_norm": "it is not proven"}},
            {"weights": {"norm": ["raw", "folded"]}},
            ["qk", "ov", "ov-folded"],
            ["m, stack self: without qk-folded: it is not proven$"],
        ),
    ],
)
def test_forms_that_cannot_be_made_are_one_sentence_and_the_rest_goes_on(around, config, forms, sentences):
    entry = locked_llama()
    (stack,) = entry.stacks
    known = None if around is None else stack.around.model_copy(update=around)
    poor = entry.model_copy(update={"stacks": (stack.model_copy(update={"around": known}),)})
    plan = make_plan({"m": poor, "other": locked_llama("other")}, load_config(config), SCRIPTS)
    assert plan.models["m"].circuits == forms
    found = study_plan.left_out(plan)
    assert len(found) == len(sentences)
    assert all(re.search(words, sentence) for words, sentence in zip(sentences, found, strict=True))
    assert (("rotary", "") in plan.models["m"].recipes) == (around is not None)


def test_the_original_files_are_of_raw_forms_at_offset_0():
    def originals(raw):
        return [
            json.loads(study_plan.stage_config(stage, load_config(raw)))["original"]["enabled"] for stage in ("eigen", "merge")
        ]

    assert originals({"weights": {"norm": ["folded", "raw"]}}) == [True, True]
    assert originals({"weights": {"norm": "folded"}}) == originals({"rotary": {"offsets": [1]}}) == [False, False]


def test_pairs_of_a_lineage_are_compared_in_raw_forms():
    assert training({"weights": {"norm": ["raw", "folded"]}}).pair_places(("m10", "m9")) == [("qk", "self"), ("ov", "self")]
    assert training({"weights": {"norm": "folded"}}).pairs == []


def test_a_circuit_that_cannot_be_read_is_left_out_with_its_reason():
    entry = locked_llama()
    (stack,) = entry.stacks
    reason = "layer 0: the checkpoint lacks tensor o_proj"
    poor = stack.model_copy(update={"circuits": {"qk": stack.circuits["qk"]}, "missing": {"ov": reason}})
    models = {"m": entry.model_copy(update={"stacks": (poor,)})}
    plan = make_plan(models, Config(), SCRIPTS)
    assert list(plan.models["m"].heads) == [("qk", "self")]
    assert study_plan.left_out(plan) == [f"m, stack self: without the circuit ov: {reason}"]
    with pytest.raises(HeadgramError, match="m has none of the circuits ov: layer 0: the checkpoint lacks tensor o_proj"):
        make_plan(models, load_config({"circuits": ["ov"]}), SCRIPTS)


def training(raw=None, labels=None):
    """The plan of three checkpoints of one training, which the manifest lists in another order than that of their steps."""
    steps = {"m10": 10.0, "m9": 9.0, "m1000": 1000.0}
    labels = {name: Labels("training", step) for name, step in steps.items()} | (labels or {})
    return make_plan({name: locked_llama(name) for name in labels}, load_config(raw or {}), SCRIPTS, labels)


@pytest.mark.parametrize(
    ("wanted", "pairs"),
    [
        (["neighbours"], [("m10", "m9"), ("m1000", "m10")]),
        (["first"], [("m10", "m9"), ("m1000", "m9")]),
        (["last"], [("m1000", "m9"), ("m1000", "m10")]),
        (["all"], [("m10", "m9"), ("m1000", "m9"), ("m1000", "m10")]),
        ([], []),
    ],
)
def test_pairs_of_a_lineage_are_those_asked_for(wanted, pairs):
    others = {"alone": Labels("other", 1.0), "free": Labels(), "free too": Labels(step=3.0)}
    plan = training({"lineage": {"pairs": wanted}}, others)
    assert plan.pairs == pairs
    assert len([record for record in plan.records() if record.startswith("provenance/lineage/")]) == len(pairs)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"weights": {"dtype": "bfloat16"}}, True),
        ({"eigen": {"topk": 2}}, True),
        ({"export": {"compression": "none"}}, True),
        ({"gram": {"pairs": "same"}}, True),
        ({"gram": {"pairs": "all"}}, False),  # as `auto` has it
        ({"gram": {"precision": "float64"}}, False),
        ({"lineage": {"pairs": ["all"]}}, False),
        ({"lineage": {"basis": "tokens"}}, True),
        ({"original": {"enabled": False}}, True),  # as spectra are
        ({"device": "cpu", "memory_budget": "1 GiB"}, False),
    ],
)
def test_keys_of_pairs_follow_the_contract(change, stale):
    before, after = (training(raw).pair_recipe(("m1000", "m9")).key for raw in ({}, change))
    assert (before != after) == stale


def test_a_model_more_and_labels_leave_pairs_as_they_are():
    before, more = training(), training(labels={"m500": Labels("training", 500.0)})
    labelled = training(labels={"m9": Labels("training", 9.5, {"data": "pile"})})
    for plan in (more, labelled):
        assert plan.pair_recipe(("m10", "m9")) == before.pair_recipe(("m10", "m9"))
        assert plan.models["m10"].recipes == before.models["m10"].recipes
    stages = {stage for stage, key in before.models["m9"].recipes.items() if labelled.models["m9"].recipes[stage] != key}
    assert stages == {("derive", ""), ("render", "")}


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"hidden": 512}, "line 3 (b): it has width 512 in stack self, but a has 768, of the lineage 'training': name another"),
        ({"rank": 32}, "line 3 (b): it has rank of qk 32 in stack self, but a has 64"),
        ({"layers": 6}, "line 3 (b): it has layers 6 in stack self, but a has 12"),
        ({"kv_heads": 12}, "line 3 (b): it has key heads 12 in stack self, but a has 4"),
        ({"first": 1}, "line 3 (b): it has layer numbers 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 in stack self, but a has 0, 1, "),
    ],
)
def test_a_lineage_of_several_shapes_is_refused(shape, words):
    rows = [Row(i, name, "", None, {}, Labels("training", i)) for i, name in ((2, "a"), (3, "b"), (4, "c"))]
    entries = {"a": locked_llama(), "b": locked_llama(**shape), "c": locked_llama()}
    (sentence,) = misfits(rows, entries)
    assert sentence.startswith(words)
    assert "basis: tokens" in sentence
    assert misfits([replace(rows[1], labels=Labels("other", 1.0)), rows[0], rows[2]], entries) == []
    assert misfits(rows, entries, "tokens") == []


def test_models_without_a_stack_in_common_are_in_no_token_space():
    rows = [Row(i, name, "", None, {}, Labels("training", i)) for i, name in ((2, "a"), (3, "b"))]
    other = locked_llama()
    other = other.model_copy(update={"stacks": tuple(each.model_copy(update={"name": "vision"}) for each in other.stacks)})
    (sentence,) = misfits(rows, {"a": locked_llama(), "b": other}, "tokens")
    assert sentence.startswith("line 3 (b): it has stacks vision, but a has self, of the lineage 'training'")


def test_pairs_in_token_space_follow_the_files_of_both():
    def key(*files):
        entries = {f"m{i}": locked_llama().model_copy(update={"files": each}) for i, each in enumerate(files)}
        labels = {name: Labels("training", float(i)) for i, name in enumerate(entries)}
        plan = make_plan(entries, load_config({"lineage": {"basis": "tokens"}}), SCRIPTS, labels)
        return plan.pair_recipe(("m1", "m0")).key

    ours, changed = ((LockedFile(name="model.safetensors", bytes=9, sample=sample),) for sample in ("a", "b"))
    assert len({key(ours, ours), key(changed, ours), key(ours, changed)}) == 3


def test_a_report_follows_from_all_models_and_their_order():
    def key(names, raw=None):
        return make_plan({name: locked_llama() for name in names}, load_config(raw or {}), SCRIPTS).report.key

    assert key("ab") == key("ab", {"device": "cpu", "report": {"enabled": False}})
    assert len({key("ab"), key("ba"), key("a"), key("ac"), key("ab", {"export": {"compression": "none"}})}) == 5


def test_a_stage_depends_on_what_it_imports():
    stages = ("extract", "eigen", "gram", "merge", "derive", "lineage")
    names = {stage: {path.name for path in modules_of(f"headgram.stages.{stage}")} for stage in stages}
    assert {"spectra.py", "residuals.py", "original.py", "tables.py"} <= names["eigen"]
    assert "inner.py" not in names["eigen"]
    assert "spectra.py" not in names["gram"]
    assert not {"heads.py", "pairs.py", "checkpoint.py"} & names["merge"]
    assert "overlaps.py" in names["derive"]
    assert not {"spectra.py", "gram.py", "merge.py", "checkpoint.py"} & names["derive"]
    assert {"drift.py", "matches.py", "inner.py"} <= names["lineage"]
    assert not {"spectra.py", "derive.py", "checkpoint.py"} & names["lineage"]
    assert {"checkpoint.py", "layouts.py", "registry.py"} <= names["extract"]
    assert all("plan.py" not in found and "cli.py" not in found for found in names.values())


def test_a_thousand_models_are_planned_at_once_without_torch():
    code = f"""
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from locked import locked_llama
from headgram.study.options import Config
from headgram.study.plan import make_plan
start = time.monotonic()
plan = make_plan({{f"m{{i}}": locked_llama() for i in range(1000)}}, Config(), Path({str(SCRIPTS)!r}))
print(json.dumps({{"models": len(plan.models), "seconds": time.monotonic() - start, "torch": "torch" in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    measured = json.loads(done.stdout)
    assert (measured["models"], measured["torch"]) == (1000, False)
    assert measured["seconds"] < 20


def test_all_pairs_unless_they_cost_too_much(monkeypatch):
    """`auto` says of which models it left pairs out; what is asked for is done."""

    def plan(pairs):
        return study_plan.make_plan({"one": locked_llama()}, load_config({"gram": {"pairs": pairs}}), SCRIPTS)

    assert plan("auto").models["one"].heads["qk", "self"].all_pairs
    assert not plan("same").models["one"].heads["qk", "self"].all_pairs
    assert study_plan.left_out(plan("auto")) == study_plan.left_out(plan("same")) == []
    for module in (study_plan, jobs):
        monkeypatch.setattr(module, "MOST_PAIR_FLOPS", 1.0)
    assert plan("all").models["one"].heads["qk", "self"].all_pairs
    assert not plan("auto").models["one"].heads["qk", "self"].all_pairs
    sentence, _ = study_plan.left_out(plan("auto"))
    assert sentence.startswith("one: all heads with all would cost more than 1e+00 operations")
