"""Types that the registry does not know: opened if a known layout is proven for them, else refused."""

import json
from pathlib import Path

import pytest
import torch

import headgram.families.registry as registry
from headgram import HeadgramError, open_checkpoint
from headgram.checkpoints.known import open_checkpoint as open_by_lock
from headgram.proofs.listed import listed_models
from headgram.proofs.shrink import walked_models
from headgram.study.lock import read_lock, write_lock
from headgram.study.manifest import read_manifest
from headgram.study.options import load_config
from headgram.study.plan import make_plan
from headgram.study.resolve import resolve, resolve_all
from tiny import write_llama, write_manifest


@pytest.fixture
def forgetful(monkeypatch):
    """The registry without `minimax_m2`."""
    known = registry.families()
    kept = tuple(
        family.model_copy(update={"model_types": tuple(name for name in family.model_types if name != "minimax_m2")})
        for family in known
    )
    monkeypatch.setattr(registry, "families", lambda: kept)


@pytest.fixture
def row(tmp_path):
    model, _ = next(listed_models("minimax_m2"))
    model.save_pretrained(tmp_path / "m")
    return read_manifest(write_manifest(tmp_path / "models.tsv", {"m": tmp_path / "m"})).rows[0]


def test_a_proven_layout_is_taken_and_kept_in_the_lock(forgetful, row):
    with pytest.raises(HeadgramError, match="'minimax_m2' is not known"):
        open_checkpoint(row.source)
    lines = []
    models, problems = resolve_all([row], progress=lines.append)
    assert problems == []
    assert models["m"].derived
    assert "derived" in lines[0]
    (stack,) = models["m"].stacks
    checkpoint = open_checkpoint(row.source, overrides={"model_type": models["m"].architecture})
    assert checkpoint.qk("self", stack.layers[0])[0].shape == (stack.heads, stack.circuits["qk"].rank, stack.hidden)


def test_a_known_type_is_not_derived_and_gives_the_same_weights(row):
    entry = resolve(row)
    assert not entry.derived
    assert entry.architecture == "minimax_m2"
    known, derived = (open_checkpoint(row.source, overrides=overrides) for overrides in (None, {"model_type": "mixtral"}))
    for layer in entry.stacks[0].layers:
        for ours, theirs in zip(known.qk("self", layer), derived.qk("self", layer), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("no_such_type", "transformers does not know the model type 'no_such_type'"),
        ("mamba", "no layout is proven for it .*no attention module was found"),
        ("dinat", "no layout is proven for it .*cannot be built small"),
    ],
)
def test_nothing_is_guessed(tmp_path, model_type, words):
    folder = write_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadgramError, match=words):
        resolve(read_manifest(write_manifest(tmp_path / "models.tsv", {"m": folder})).rows[0])


def forget(monkeypatch, model_type: str) -> None:
    """The registry without a type, whose family goes with it if it was the only one."""
    kept = tuple(
        family.model_copy(update={"model_types": others})
        for family in registry.families()
        if (others := tuple(name for name in family.model_types if name != model_type)) or not family.model_types
    )
    monkeypatch.setattr(registry, "families", lambda: kept)
    monkeypatch.setattr("headgram.proofs.prove.families", lambda: kept)


@pytest.mark.parametrize(
    ("model_type", "stacks"),
    [
        ("ctrl", ["self"]),
        ("moonshine", ["encoder", "decoder", "cross"]),
        ("embedding_gemma2_text", ["sliding", "full"]),  # whose layers have counts of their own
        ("detr", ["encoder", "decoder", "cross"]),  # whose modules add places to what queries and keys read
    ],
)
def test_a_layout_that_no_known_type_has_is_read_off_live_models_and_kept_in_the_lock(tmp_path, monkeypatch, model_type, stacks):
    model, _ = next(walked_models(model_type))
    model.save_pretrained(tmp_path / "m")
    known = open_checkpoint(tmp_path / "m")
    forget(monkeypatch, model_type)
    with pytest.raises(HeadgramError, match=f"'{model_type}' is not known"):
        open_checkpoint(tmp_path / "m")
    (row,) = read_manifest(write_manifest(tmp_path / "models.tsv", {"m": tmp_path / "m"})).rows
    entry = resolve(row)
    assert entry.derived
    assert [stack.name for stack in entry.stacks] == stacks
    write_lock(tmp_path / "models.lock.json", {"m": entry})
    read = read_lock(tmp_path / "models.lock.json").models["m"]
    assert read == entry
    make_plan({"m": read}, load_config({}), Path(__file__).parents[2] / "workflow" / "scripts")
    opened = open_by_lock(**read.how_to_open())
    for stack in known.stacks:
        for layer in stack.layers:
            for role, factor in known.factors(stack.name, layer).items():
                assert torch.equal(opened.factors(stack.name, layer)[role], factor)


def test_derive_is_asked_for_in_python(tmp_path, monkeypatch):
    model, _ = next(walked_models("ctrl"))
    model.save_pretrained(tmp_path)
    forget(monkeypatch, "ctrl")
    assert open_checkpoint(tmp_path, derive=True).stacks[0].heads == model.config.n_head


@pytest.mark.parametrize("place", ["{layer.__class__}.", "{layer:99999999}.", "{0}.", "{layer}.{layer}.", "a" * 501])
def test_names_in_a_lock_hold_nothing_but_the_layer(place):
    stack = {"name": "self", "layout": "separate", "block": place, "modules": {"query": "q", "key": "k"}}
    with pytest.raises(ValueError, match="block"):
        registry.Family(name="x", model_types=("x",), stacks=(stack,))
