"""Folders of every kind of name, through the doors that take a path. Runs in such folders: tests/pipeline/test_installed.py."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import headgram
from headgram.cli import app
from tiny import llama_tensors, write_llama, write_llama_gguf, write_manifest

NAMES = {
    "blanks": "two  blanks and a trailing one ",
    "quotes": 'it\'s "quoted" & $HOME; `x` #1',
    "unicode": "größe 模型 🙂 e\u0301",
    "dashes": "--no-option",
    "percent": "50%2F and %s {curly} [red]x[/red]",
    "long": "/".join(["länge " * 20] * 20),
}


@pytest.fixture(params=NAMES)
def folder(request, tmp_path, monkeypatch) -> Path:
    """A folder below the working folder, given relative to it, and reached through a link."""
    monkeypatch.chdir(tmp_path)
    real = Path("real", NAMES[request.param])
    real.mkdir(parents=True)
    Path("a link").symlink_to("real")
    return Path("a link", NAMES[request.param])


def torch_llama(folder: Path) -> Path:
    write_llama(folder, layers=1)
    (folder / "model.safetensors").unlink()
    torch.save(llama_tensors(1, 4, 2, 8, 32, seed=0), folder / "pytorch_model.bin")
    return folder


def gguf_llama(folder: Path) -> Path:
    folder.mkdir()
    write_llama_gguf(folder / "model.gguf", layers=1)
    return folder / "model.gguf"


FORMATS = {"safetensors": lambda folder: write_llama(folder, layers=1), "bin": torch_llama, "gguf": gguf_llama}


def test_checkpoints_and_commands_take_any_path(folder):
    for name, write in FORMATS.items():
        source = write(folder / name)
        for path in (source, source.absolute(), str(source)):
            with headgram.open_checkpoint(path) as checkpoint:
                assert checkpoint.qk("self", 0)[0].shape == (4, 8, 32)
        inspected = CliRunner().invoke(app, ["inspect", f"./{source}"])
        assert inspected.exit_code == 0, inspected.output
    manifest = write_manifest(folder / "list of models.tsv", {name: f"{folder}/{name}" for name in ("safetensors", "bin")})
    locked = CliRunner().invoke(app, ["lock", "--manifest", str(manifest)])
    assert locked.exit_code == 0, (locked.output, locked.exception)
    assert set(json.loads((folder / "list of models.lock.json").read_text())["models"]) == {"safetensors", "bin"}
    out = folder / "measured.json"
    measured = CliRunner().invoke(app, ["measure", "--model", str(folder / "bin"), "--out", str(out), "--topk", "2"])
    assert measured.exit_code == 0, (measured.output, measured.exception)
    assert json.loads(out.read_text())["num_heads"] == 4
