"""Reading the Snakefile resolves new rows, and compares files that were touched with the lock, in its own process.

For types that the registry knows, and weights that are not quantised, it imports no torch.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.checkpoint
from adapter_files import adapter, base
from safetensors.torch import load_file

from headgram.study.lock import lock_path, write_lock
from headgram.study.manifest import read_manifest
from headgram.study.resolve import resolve_all
from tiny import write_bert, write_llama, write_llama_gguf, write_manifest

#: What a Snakefile does when it is read; and which heavy modules that imported.
CODE = """
import json, sys
from pathlib import Path
from headgram.run.startup import Run
run = Run(None, {"manifest": "models.tsv"}, Path(sys.argv[1]))
heavy = [name for name in ("torch", "transformers", "pandas", "pyarrow") if name in sys.modules]
print(json.dumps([{name: model.entry.fingerprint for name, model in run.plan.models.items()}, heavy]))
"""
SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"


def read_snakefile(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, str(SCRIPTS)], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def study(tmp_path):
    """A manifest with a model in each format."""
    write_llama(tmp_path / "llama")
    write_bert(tmp_path / "bert")
    write_llama_gguf(tmp_path / "llama.gguf")
    adapter(tmp_path / "adapter", base(tmp_path / "base"))
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    for name in ("pickled", "distributed"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "llama" / "config.json", tmp_path / name)
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    torch.distributed.checkpoint.save(tensors, checkpoint_id=tmp_path / "distributed", no_dist=True)
    models = {name: name for name in ("llama", "bert", "llama.gguf", "adapter", "pickled", "distributed")}
    return write_manifest(tmp_path / "models.tsv", {name.replace(".", "-"): path for name, path in models.items()})


def test_new_rows_take_no_torch(study, monkeypatch):
    monkeypatch.chdir(study.parent)
    expected, problems = resolve_all(read_manifest(study).rows)
    assert problems == []
    done = read_snakefile(study.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{name: entry.fingerprint for name, entry in expected.items()}, []]
    assert all(f"resolved {name}: " in done.stderr for name in expected)
    assert not lock_path(study).exists()  # reading writes nothing


def test_touched_files_are_compared_without_torch(study, monkeypatch):
    monkeypatch.chdir(study.parent)
    entries, _ = resolve_all(read_manifest(study).rows)
    write_lock(lock_path(study), entries)
    weights = study.parent / "llama" / "model.safetensors"
    later = time.time() + 10
    os.utime(weights, (later, later))
    done = read_snakefile(study.parent)
    assert (done.returncode, json.loads(done.stdout)[1]) == (0, []), done.stderr
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # of the last tensor: no sample of the file, and its size stays
    weights.write_bytes(content)
    os.utime(weights, (later, later))
    assert "since it was locked" in read_snakefile(study.parent).stderr
