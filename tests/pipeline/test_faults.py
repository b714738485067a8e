"""Bad input and bad luck: one clear sentence, no partial artifact, other models unharmed."""

import json
import re
import resource
import signal
import socket
import subprocess

import pytest
import torch

from pipeline.conftest import edit
from tiny import llama_tensors, write_llama, write_manifest


def assert_nothing_half_written(project):
    leftovers = [path for path in (project.folder / "results").rglob("*") if path.name.endswith(".tmp")]
    assert leftovers == []


def errors_of(done: subprocess.CompletedProcess) -> list[str]:
    """What headgram said, but for how far the run is, and that the tiny models have no outputs to read."""
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("headgram: ")]
    return [
        line for line in said if not re.match(r"headgram: (\d+ of \d+ jobs|tiny-\w+, stack self: without the circuit ov)", line)
    ]


def test_a_nan_stops_its_own_model_only(project, finished):
    tensors = llama_tensors(4, 4, 2, 8, 32, seed=0)
    tensors["model.layers.2.self_attn.q_proj.weight"][5, 5] = torch.nan
    write_llama(project.folder / "models" / "llama", tensors=tensors)
    done = project.snakemake("--cores", "2")
    assert done.returncode != 0
    named = "headgram: model tiny-llama, stack self: layer 2: tensor model.layers.2.self_attn.q_proj.weight holds a NaN"
    assert {sentence[: len(named)] for sentence in errors_of(done)} == {named}
    assert not list((project.folder / "results").rglob("models/tiny-llama/self/**/*.pt"))
    assert_nothing_half_written(project)
    assert {name: data for name, data in finished.tables().items() if "bert" in name} == project.tables()


def test_ctrl_c_while_a_row_is_resolved_leaves_no_traceback(project):
    """At a hub that never answers."""
    write_manifest(project.folder / "config" / "models.tsv", {"far": "someone/far-away"})
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.settimeout(project.patience)
        place = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HOME": str(project.folder)}
        command, streams = project.command("-n"), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=project.folder, env=project.environment() | place, **streams) as run:
            asked, _ = hub.accept()
            with asked:
                asked.recv(1)
                run.send_signal(signal.SIGINT)
                said, _ = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT
    assert "Traceback" not in said


def test_a_residual_above_tolerance_names_model_layer_and_head(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    edit(project.folder / "config" / "config.yaml", "tolerance: 1.0e-9", "tolerance: 1.0e-25")
    done = project.snakemake("--cores", "2")
    assert done.returncode != 0
    sentences = errors_of(done)
    assert any(
        "model tiny-llama, stack self, circuit qk, layer 0, head" in sentence and "eigen.tolerance" in sentence
        for sentence in sentences
    )
    assert not list((project.folder / "results").rglob("eigen/*.parquet"))


@pytest.mark.parametrize(
    ("victim", "command"), [("weights/layers-000-003.pt", "snakemake"), ("eigen/layers-000-001.parquet", "headgram run")]
)
def test_a_flipped_byte_is_refused_and_mended(finished, tmp_path, victim, command):
    project = finished.copy(tmp_path / "project")
    path = project.folder / "results" / "models" / "tiny-llama" / "self" / "qk" / victim
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    edit(project.folder / "config" / "config.yaml", "compression: zstd", "compression: none")
    if "weights" in victim:
        edit(project.folder / "config" / "config.yaml", "topk: 8", "topk: 4")
    done = project.snakemake("--cores", "2") if command == "snakemake" else project.headgram("run", "--cores", "2")
    assert any(path.name in sentence and "checksum differs; its record was removed" in sentence for sentence in errors_of(done))
    if command == "snakemake":
        assert done.returncode != 0
        project.run()
    assert project.planned() == set()
    assert not list(project.folder.glob(".headgram-*"))
    assert project.headgram("verify").returncode == 0


def test_several_bad_rows_are_reported_at_once(project):
    manifest = project.folder / "config" / "models.tsv"
    write_manifest(manifest, {"good": "models/llama", "../x": "models/bert", "gone": "models/none", "Good": "models/bert"})
    done = project.snakemake("--cores", "2")
    assert done.returncode != 0
    for words in (
        "line 3 (../x)",
        "line 4 (gone): there is no file or folder 'models/none'",
        "line 5 (Good): the name 'Good' is taken by line 2",
    ):
        assert words in done.stderr
    assert not (project.folder / "results").exists()


def test_an_unknown_key_stops_before_any_job(project):
    done = project.snakemake("--cores", "2", "--config", "eign={topk: 4}")
    assert done.returncode != 0
    assert "unknown key 'eign' (did you mean 'eigen'?)" in done.stderr
    assert "Traceback" not in done.stderr


def test_manifest_and_results_from_the_command_line(project):
    write_manifest(project.folder / "study" / "few.tsv", {"one": "models/bert"})
    project.run("--config", "manifest=study/few.tsv", "results=study/out")
    assert (project.folder / "study" / "few.lock.json").exists()
    assert (project.folder / "study" / "out" / "atlas" / "heads" / "model=one" / "heads.parquet").exists()
    assert not (project.folder / "results").exists()


def test_a_write_that_fails_leaves_nothing(project):
    """As on a full disk: the kernel refuses to let any file grow beyond a few KiB."""
    done = subprocess.run(
        project.command("--cores", "1"),
        cwd=project.folder,
        env=project.environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)),
    )
    assert done.returncode != 0
    assert any("weights/layers-000-003.pt cannot be written" in sentence for sentence in errors_of(done)), done.stderr
    assert not list((project.folder / "results" / "models" / "tiny-llama" / "self").rglob("*.pt"))
    assert_nothing_half_written(project)
    project.run()


def test_a_gpu_that_is_asked_for_and_missing(project, monkeypatch):
    """A run that computes here is refused; a plan made elsewhere, such as on a login node, is not."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = project.snakemake("--cores", "1", "--config", "device=cuda")
    assert done.returncode != 0
    assert "no GPU is visible here" in done.stderr
    assert not (project.folder / "results").exists()
    assert project.planned("--config", "device=cuda")


def test_a_job_on_a_node_trusts_the_lock(project):
    """Models may be added while jobs wait in a queue."""
    assert project.headgram("lock").returncode == 0
    with (project.folder / "config" / "models.tsv").open("a") as file:
        file.write("later\tmodels/not-there-yet\t\n")
    record = "results/models/tiny-bert/self/qk/weights/layers-000-002.json"
    done = project.snakemake("--mode", "remote", "--cores", "1", "--force", "--allowed-rules", "extract", "--", record)
    assert done.returncode == 0, done.stderr
    assert (project.folder / record).exists()


@pytest.mark.parametrize("stage", ["around", "rotary"])
def test_what_an_older_lock_does_not_pin_is_one_sentence(finished, tmp_path, stage):
    project = finished.copy(tmp_path / "project")
    path = project.folder / "config" / "models.lock.json"
    lock = json.loads(path.read_text())
    for stack in lock["models"]["tiny-llama"]["stacks"]:
        stack["around"] = None
    path.write_text(json.dumps(lock))
    done = project.snakemake("-n", f"results/provenance/{stage}/tiny-llama.json")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "its lock does not pin" in said
    assert "`headgram lock --upgrade tiny-llama` pins them" in said
    assert "TypeError" not in said
