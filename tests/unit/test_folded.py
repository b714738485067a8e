"""Factors with norms folded in, at offsets, from files as a run writes them, against queries and keys of running models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extracted import extracted, locked, tiny
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from headgram import HeadgramError, open_checkpoint
from headgram.proofs.around import without_epsilon
from headgram.proofs.prove import _calls, quiet
from headgram.results.around import around_of
from headgram.study.manifest import read_manifest
from headgram.study.resolve import resolve, unlike_its_lock

#: Types, and switches of their configuration: each norm, pairing of rows, and width of what turns.
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "gemma2", "gemma3_text", "cohere", "cohere2", "qwen3", "olmo", "olmo2", "olmo3")},
    **{
        name: (name, {})
        for name in ("gpt_neox", "gptj", "phi", "phi3", "glm4", "stablelm", "deepseek_v3", "modernbert", "falcon")
    },
    **{name: (name, {}) for name in ("qwen3_next", "smollm3", "exaone4", "persimmon", "codegen", "granite", "llama4_text")},
    "mrope": ("qwen2_vl_text", {}),
    "mrope of planes in turn": ("qwen3_vl_text", {}),
    "mrope, interleaved": ("glm4v_text", {}),
    **{
        name: ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": name, "factor": 4.0, **numbers}})
        for name, numbers in {
            "linear": {},
            "dynamic": {},
            "yarn": {"original_max_position_embeddings": 32},
            "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40},
            "longrope": {
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [2.0] * 6,
                "original_max_position_embeddings": 16,
            },
        }.items()
    },
}
PLAIN = {name: (name, {}) for name in ("gpt2", "opt", "bert", "mpt", "bloom", "vit")}


@pytest.mark.parametrize("name", [*ROTARY, *PLAIN])
def test_forms_of_the_stream_are_the_models_scores_at_every_offset(tmp_path: Path, name: str) -> None:
    """Cosines of the model's queries and keys, after its norms and its rotary encoding; the stream is what the block is given."""
    model, entry = tiny(*(ROTARY | PLAIN)[name])
    of = extracted(tmp_path, locked(model, tmp_path)).form
    model.double()
    without_epsilon(model)
    with quiet():
        calls = [call for call in _calls(model, entry, placed=True) if call.block in call.outer]
    offsets = range(-3, 4) if name in ROTARY else [0]
    names = {offset: f"qk-folded@{offset}" if offset else "qk-folded" for offset in offsets}
    sources = {offset: of(form) for offset, form in names.items()}
    with open_checkpoint(tmp_path / "m") as checkpoint:
        rotary = checkpoint.around("self", checkpoint.stack("self").layers[0]).rotary()
    start = rotary.start if rotary else 0
    compared = 0
    for call in calls:
        stream = call.outer[call.block].double().reshape(-1, call.x.shape[-1])
        if call.layer not in sources[0].layers or call.query.shape[0] != sources[0].heads:
            continue
        for offset, source in sources.items():
            heads = source.read([call.layer]).to(torch.float64)
            query, key = ((side @ stream.T).mT for side in (heads.right(), heads.left()))
            # Latent attention divides what turns and what does not by different norms: they are compared apart.
            for part in (slice(start), slice(start, None)) if start else (slice(None),):
                sides = [(query, key), (call.query, call.key)]
                cosines = [normalize(q[..., part], dim=-1) @ normalize(k[..., part], dim=-1).mT for q, k in sides]
                pairs = [each.diagonal(-offset, 1, 2) if name in ROTARY else each for each in cosines]
                torch.testing.assert_close(*pairs, rtol=2e-5, atol=2e-6)
                compared += pairs[0].numel()
    assert compared > 0


@pytest.mark.parametrize("model_type", ["t5", "whisper", "bart", "pegasus"])
def test_forms_between_two_streams_are_the_models_scores(tmp_path: Path, model_type: str) -> None:
    """Queries read the decoder's stream through a norm of their own, keys what the encoder's last block has left."""
    model, entry = tiny(model_type, {})
    found = extracted(tmp_path, locked(model, tmp_path))
    model.double()
    without_epsilon(model)
    with quiet():
        calls = [call for call in _calls(model, entry, placed=True) if call.x.shape != call.y.shape or not call.x.equal(call.y)]
    source, values = found.form("qk-folded", "cross"), found.form("ov-folded", "cross")
    for call in calls:
        heads, moved = (each.read([call.layer]).to(torch.float64) for each in (source, values))
        read, written = (each.double().reshape(-1, each.shape[-1]) for each in (call.source, call.stream))
        query, key, value = heads.right() @ written.T, heads.left() @ read.T, moved.right() @ read.T
        cosines = [normalize(q, dim=-1) @ normalize(k, dim=-1).mT for q, k in ((query.mT, key.mT), (call.query, call.key))]
        torch.testing.assert_close(*cosines, rtol=2e-5, atol=2e-6)
        if found.frames["cross"].layers[call.layer].source_norm is None or model_type == "t5":  # no bias of a norm
            of_values = [normalize(each, dim=-1) for each in (value.mT, call.reading.value)]
            torch.testing.assert_close(*of_values, rtol=2e-5, atol=2e-6)
    assert len(calls) == len(source.layers)


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2", "llama", "dinov2", "beit", "data2vec-vision"])
def test_values_are_read_through_one_norm_and_outputs_written_through_another(tmp_path: Path, model_type: str) -> None:
    """What the model adds to its stream, but for one number for each token: the length of what all heads write."""
    model, entry = tiny(model_type, {})
    found = extracted(tmp_path, locked(model, tmp_path))
    if model_type == "gemma2":
        stored, made = (found.form(form).read([1]) for form in ("ov", "ov-folded"))
        torch.testing.assert_close(made.b, stored.b * (1 + model.layers[1].input_layernorm.weight.detach()))
    model.double()
    without_epsilon(model)
    with quiet():
        calls = _calls(model, entry, placed=True)
    for call in calls:
        heads = found.form("ov-folded").read([call.layer]).to(torch.float64)
        written = (call.reading.heads @ heads.left()).sum(0)
        added = call.added.double().reshape(-1, written.shape[-1])
        torch.testing.assert_close(normalize(written, dim=-1), normalize(added, dim=-1), rtol=2e-5, atol=2e-6)
    assert calls
    said = around_of("ov-folded", found.frames["self"])["not_folded"]
    assert ("a norm after attention divides what all heads write" in said) == (model_type in ("gemma2", "olmo2"))


def test_heads_of_a_layer_read_apart_are_those_read_together(tmp_path: Path) -> None:
    """Norms of queries and keys have a row of gains for each head, or for each key."""
    model, _ = tiny("olmo2", {})
    source = extracted(tmp_path, locked(model, tmp_path)).form("qk-folded@2")
    whole = source.read([0, 1])
    apart = [source.read([layer], range(head, head + 1)) for layer in (0, 1) for head in range(source.heads)]
    for head, one in enumerate(apart):
        torch.testing.assert_close(one.form(0), whole.form(head), rtol=1e-6, atol=1e-6)


def test_a_form_that_is_not_proven_is_one_sentence(tmp_path: Path) -> None:
    model, _ = tiny("zamba2", {})
    of = extracted(tmp_path, locked(model, tmp_path)).form
    assert of("qk").heads
    with pytest.raises(HeadgramError, match="the form qk-folded cannot be made: the stack 'self' has no role 'norm' to read: "):
        of("qk-folded")


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_changed_gain_is_noticed_and_makes_no_raw_form_stale(tmp_path: Path) -> None:
    model, _ = tiny("llama", {})
    before = locked(model, tmp_path)
    name = "layers.1.input_layernorm.weight"
    rewritten(tmp_path / "m" / "model.safetensors", lambda tensors: tensors.update({name: tensors[name] + 1}))
    (sentence,) = unlike_its_lock("m", before)
    assert "a norm or a bias of stack 'self', layer 1 of" in sentence
    words = "model m, stack self: a norm or a bias of layer 1 changed since it was locked; .* `headgram lock --upgrade m`"
    with pytest.raises(HeadgramError, match=words):
        extracted(tmp_path, before)
    assert not (tmp_path / "around.pt").exists()
    after = resolve(read_manifest(tmp_path / "models.tsv").rows[0])
    assert after.around_fingerprint() != before.around_fingerprint()
    assert after.fingerprint == before.fingerprint
    assert all(after.fingerprint_of(circuit) == before.fingerprint_of(circuit) for circuit in ("qk", "ov"))


def test_a_changed_base_of_rotary_encoding_changes_what_follows_from_it(tmp_path: Path) -> None:
    model, _ = tiny("llama", {})
    before = locked(model, tmp_path)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}))
    after = resolve(read_manifest(tmp_path / "models.tsv").rows[0])
    assert after.around_fingerprint() != before.around_fingerprint()
    assert after.fingerprint == before.fingerprint


def test_what_cannot_be_read_is_missing_and_the_rest_is_there(tmp_path: Path) -> None:
    model, _ = tiny("llama", {})
    locked(model, tmp_path)
    rewritten(tmp_path / "m" / "model.safetensors", lambda tensors: tensors.pop("layers.0.input_layernorm.weight"))
    entry = resolve(read_manifest(tmp_path / "models.tsv").rows[0])
    around = entry.stacks[0].around
    assert around is not None
    reason = "layer 0: the checkpoint lacks tensor layers.0.input_layernorm.weight"
    assert around.missing == {"norm": reason, "source_norm": reason}
    of = extracted(tmp_path, entry).form
    assert of("qk@3").heads
    with pytest.raises(HeadgramError, match=r"the checkpoint lacks tensor layers\.0\.input_layernorm\.weight"):
        of("ov-folded")
