"""Extraction writes what was locked, or nothing."""

import json

import pytest

import headgram.stages.extract as stage
from headgram.checkpoints.checkpoint import open_checkpoint
from headgram.errors import HeadgramError
from headgram.results.record import Identity, Provenance
from tiny import write_llama


def test_a_file_that_is_replaced_between_check_and_read_is_refused(tmp_path, monkeypatch):
    folder = write_llama(tmp_path / "llama")
    with open_checkpoint(folder) as checkpoint:
        digests = [checkpoint.digest("self", layer) for layer in range(4)]
    read = stage.read_layers

    def replaced_meanwhile(*arguments):
        (write_llama(tmp_path / "other", seed=1) / "model.safetensors").replace(folder / "model.safetensors")
        return read(*arguments)

    monkeypatch.setattr(stage, "read_layers", replaced_meanwhile)
    provenance = Provenance(Identity("extract", json.dumps({}), "f", "c"), "m", "self", "qk")
    with pytest.raises(HeadgramError, match="self: model.safetensors changed while it was read; .*lock --upgrade m"):
        stage.extract(tmp_path / "out.pt", {"source": folder}, range(4), digests, "stored", provenance)
    assert not (tmp_path / "out.pt").exists()
