"""Types that the registry does not know: opened if a known layout is proven for them, else refused."""

import json

import pytest
import torch

import headgram.families.registry as registry
from headgram import HeadgramError, open_checkpoint
from headgram.proofs.prove import _models
from headgram.study.manifest import read_manifest
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
    model, _ = next(_models("minimax_m2"))
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
        ("mamba", "no known layout is proven for it"),  # it has no attention
        ("deformable_detr", "cannot build a tiny 'deformable_detr'"),
    ],
)
def test_nothing_is_guessed(tmp_path, model_type, words):
    folder = write_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadgramError, match=words):
        resolve(read_manifest(write_manifest(tmp_path / "models.tsv", {"m": folder})).rows[0])
