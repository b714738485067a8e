"""Extraction writes what was locked, or nothing."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import headgram.stages.extract as stage
from headgram.checkpoints.checkpoint import Checkpoint
from headgram.checkpoints.known import open_checkpoint
from headgram.cli import app
from headgram.errors import MANIFEST, HeadgramError
from headgram.results.record import Provenance, Recipe
from headgram.study.lock import lock_path, read_lock
from tiny import write_llama, write_manifest


@pytest.mark.parametrize("manifest", [MANIFEST, Path("a study/its models.tsv")], ids=str)
def test_a_file_that_is_replaced_between_check_and_read_is_refused(tmp_path, monkeypatch, manifest):
    """And the hint, followed, locks the model of just this manifest anew."""
    folder = write_llama(tmp_path / "llama")
    with open_checkpoint(folder) as checkpoint:
        digests = [checkpoint.digest("self", layer) for layer in range(4)]
    read = Checkpoint.factors

    def replaced_meanwhile(*arguments):
        if arguments[2] == 3:  # the last layer
            (write_llama(tmp_path / "other", seed=1) / "model.safetensors").replace(folder / "model.safetensors")
        return read(*arguments)

    monkeypatch.setattr(Checkpoint, "factors", replaced_meanwhile)
    provenance = Provenance(Recipe("extract", json.dumps({}), "f", "c"), "m", "self", "qk")
    with pytest.raises(HeadgramError, match="self: model.safetensors changed while it was read; ") as refused:
        stage.extract(tmp_path / "out.pt", {"source": folder}, range(4), digests, "stored", provenance, manifest)
    assert not (tmp_path / "out.pt").exists()
    monkeypatch.chdir(tmp_path)
    write_manifest(manifest, {"m": folder, "other": folder})
    program, *command = shlex.split(re.search(r"run `(.*?)`", str(refused.value))[1])
    assert program == "headgram"
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert set(read_lock(lock_path(manifest)).models) == {"m", "other"}
