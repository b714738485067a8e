"""`headgram measure` against a literal re-run of the original script's loops."""

import json
import subprocess
import sys

import pytest
import torch

from headgram import HeadgramError
from headgram.geometry import blocks
from headgram.measure import measure_model
from script_loops import assert_same_as_script, original_script
from tiny import write_llama

pytestmark = pytest.mark.usefixtures("both_ways")


@pytest.mark.parametrize("dtype", ["bfloat16", "stored"])
def test_both_files_agree_with_the_script(tmp_path, dtype):
    source = write_llama(tmp_path / "model", layers=3, heads=4, kv_heads=2, rank=8, hidden=32)
    out = tmp_path / "out.v1.json"
    measure_model(str(source), out, topk=5, revision=None, stack=None, dtype=dtype, device="cpu")

    from headgram import open_checkpoint

    checkpoint = open_checkpoint(source)
    pairs = [checkpoint.qk("self", layer) for layer in range(3)]
    w_q, w_k = (torch.stack(weights) for weights in zip(*pairs, strict=True))
    if dtype == "bfloat16":
        w_q, w_k = w_q.bfloat16(), w_k.bfloat16()
    written = json.loads(out.read_text())
    assert {key: written[key] for key in written if key not in ("gram", "fro_sq")} == {
        "model": str(source),
        "num_layers": 3,
        "num_heads": 4,
        "head_dim": 8,
        "hidden_size": 32,
        "topk": 5,
    }
    tensors = torch.load(tmp_path / "out.v1-eigdirs.pt")
    assert_same_as_script(written, tensors, original_script(w_q, w_k, 5), signed=bool(blocks.ONE_BY_ONE))


def test_command_line_does_what_the_script_does(tmp_path):
    source = write_llama(tmp_path / "model")
    command = [sys.executable, "-m", "headgram", "measure", "--model", str(source), "--out", "F.json", "--topk", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "F.json").read_text())["topk"] == 3
    assert torch.load(tmp_path / "F-eigdirs.pt")["eig_dirs"].shape == (4, 4, 3, 32)


def test_output_name_must_end_in_json(tmp_path):
    with pytest.raises(HeadgramError, match=r"must end in \.json"):
        measure_model(str(write_llama(tmp_path / "model")), tmp_path / "out.txt", 8, None, None, "bfloat16", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_gpu_that_torch_cannot_use_is_left_alone(tmp_path, monkeypatch, capsys):
    import headgram.run.devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert headgram.run.devices.require_device("auto")
    measure_model(str(write_llama(tmp_path / "model")), tmp_path / "out.json", 8, None, None, "bfloat16", "auto")
    assert "computing on the CPU" in capsys.readouterr().out
    assert (tmp_path / "out.json").exists()
