"""What each change makes stale: the exact set of jobs of a dry run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from headgram.errors import HeadgramError
from headgram.run.startup import _check_snakemakes_memory
from pipeline.conftest import Project, edit
from tiny import llama_tensors, write_llama

MODELS = {"tiny-llama": (3, ((0, 1), (2, 3))), "tiny-bert": (2, ((0, 1), (2, 2)))}


def jobs(*stages: str, models=("tiny-llama", "tiny-bert")) -> set[str]:
    """Messages of all jobs of some stages."""
    found = set()
    for model in models:
        last, runs = MODELS[model]
        spans = [f"layers-{first:03d}-{final:03d}" for first, final in runs]
        of = f"{model}, stack self, circuit qk"
        if "extract" in stages:
            found.add(f"Extracting {of}, layers-000-{last:03d}")
        if "around" in stages:
            found.add(f"Reading what stands around the projections of {model}")
        if "rotary" in stages:
            found.add(f"Scores of {model} by offset and frequency")
        if "eigen" in stages:
            found |= {f"Spectra of {of}, {span}" for span in spans}
        if "gram" in stages:
            found |= {f"Gram matrix of {of}, row-{i:03d}" for i in range(len(runs))}
        if "merge" in stages:
            found.add(f"Merging {model}")
        if "derive" in stages:
            found.add(f"Deriving the tables of {model}")
    return found


#: Of what is extracted of queries and keys.
FACTORS = ("extract", "eigen", "gram", "rotary", "merge", "derive")
ALL = (*FACTORS, "around")

CHANGES = [
    ("topk: 8", "topk: 4", ("eigen", "merge", "derive")),
    ("tolerance: 1.0e-9", "tolerance: 1.0e-8", ("eigen", "merge", "derive")),
    ("pairs: auto", "pairs: same", ("gram", "merge", "derive")),
    ("enabled: true", "enabled: false", ("eigen", "merge", "derive")),
    ("dtype: stored", "dtype: bfloat16", FACTORS),
    ("compression: zstd", "compression: none", ("rotary", "merge", "derive")),
    ("device: auto", "device: cpu", ()),
    ("manifest: config/models.tsv\nresults: results", "results: results\nmanifest: config/models.tsv", ()),
    ("results: results", "results: results # a comment", ()),
    ("memory_budget: 2 GiB", "memory_budget: 1 GiB", ()),
]


def test_a_fresh_clone_plans_every_job_and_writes_nothing(project):
    before = sorted(path for path in project.folder.rglob("*") if ".snakemake" not in path.parts)
    assert project.planned() == jobs(*ALL)
    assert sorted(path for path in project.folder.rglob("*") if ".snakemake" not in path.parts) == before


def test_a_second_run_does_nothing(finished):
    assert finished.planned() == set()


@pytest.mark.parametrize("memory", ["kept", "lost"])
def test_each_key_makes_stale_what_reads_it(finished, tmp_path, memory):
    project = finished.copy(tmp_path / "project")
    if memory == "lost":
        shutil.rmtree(project.folder / ".snakemake")
    config = project.folder / "config" / "config.yaml"
    original = config.read_text()
    for old, new, stages in CHANGES:
        edit(config, old, new)
        assert project.planned() == jobs(*stages), (new, memory)
        config.write_text(original)
    assert project.planned() == set()


def test_other_tiles_make_only_gram_stale(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    edit(project.folder / "config" / "config.yaml", "layers_per_tile: 2", "layers_per_tile: 4")
    rows = {f"Gram matrix of {model}, stack self, circuit qk, row-000" for model in MODELS}
    assert project.planned() == rows | jobs("merge", "derive")


def test_swapped_values_are_noticed(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    config = project.folder / "config" / "config.yaml"
    original = config.read_text()
    config.write_text(original.replace("topk: 8", "topk: 1").replace("tolerance: 1.0e-9", "tolerance: 2"))
    project.run()
    config.write_text(original.replace("topk: 8", "topk: 2").replace("tolerance: 1.0e-9", "tolerance: 1"))
    assert project.planned() == jobs("eigen", "merge", "derive")


def test_jobs_of_an_earlier_cut_are_not_made_again(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    edit(project.folder / "config" / "config.yaml", "layers_per_job: 2", "layers_per_job: 4")
    project.run()
    edit(project.folder / "config" / "config.yaml", "layers_per_job: 4", "layers_per_job: 2")
    assert project.planned() == jobs("merge", "derive")


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("forms/heads.py", FACTORS),
        ("geometry/spectra.py", ("eigen", "merge", "derive")),
        ("geometry/residuals.py", ("eigen", "merge", "derive")),
        ("geometry/inner.py", ("gram", "merge", "derive")),
        ("geometry/scores.py", ("eigen", "merge", "derive")),
        ("geometry/overlaps.py", ("derive",)),
        ("geometry/original.py", ("eigen", "merge", "derive")),
        ("stages/extract.py", FACTORS),
        ("stages/around.py", ("around", "rotary", "merge", "derive")),
        ("stages/rotary.py", ("rotary", "merge", "derive")),
        ("stages/eigen.py", ("eigen", "merge", "derive")),
        ("stages/gram.py", ("gram", "merge", "derive")),
        ("stages/merge.py", ("merge", "derive")),
        ("stages/derive.py", ("derive",)),
        ("results/original.py", ("merge", "derive")),
        ("checkpoints/stores.py", ALL),
        ("results/record.py", ALL),
        ("atlas/reader.py", ()),
        ("study/plan.py", ()),
        ("cli.py", ()),
    ],
)
def test_a_changed_constant_of_a_module(finished, tmp_path, module, stages):
    project = finished.copy(tmp_path / "project")
    with (project.folder / "src" / "headgram" / module).open("a") as file:
        file.write("\n_X = 1\n")
    assert project.planned() == jobs(*stages)


def test_comments_and_docstrings_make_nothing_stale(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    folders = (
        "src/headgram/geometry",
        "src/headgram/stages",
        "src/headgram/results",
        "src/headgram/checkpoints",
        "workflow/scripts",
    )
    for path in (path for folder in folders for path in (project.folder / folder).glob("*.py")):
        edit(path, '"""', '# Anew.\n"""Anew. ')
    assert project.planned() == set()


def test_a_changed_constant_of_a_script(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    with (project.folder / "workflow" / "scripts" / "gram.py").open("a") as file:
        file.write("_X = 1\n")
    assert project.planned() == jobs("gram", "merge", "derive")


def test_one_byte_of_a_family_file_concerns_its_models(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    with (project.folder / "src" / "headgram" / "families" / "bert.toml").open("a") as file:
        file.write("#\n")
    assert project.planned() == jobs(*ALL, models=["tiny-bert"])


def test_a_new_model_runs_alone(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    write_llama(project.folder / "models" / "new", layers=1, seed=5)
    with (project.folder / "config" / "models.tsv").open("a") as file:
        file.write("new\tmodels/new\t\n")
    assert project.planned() == {
        "Extracting new, stack self, circuit qk, layers-000-000",
        "Spectra of new, stack self, circuit qk, layers-000-000",
        "Gram matrix of new, stack self, circuit qk, row-000",
        "Reading what stands around the projections of new",
        "Scores of new by offset and frequency",
        "Merging new",
        "Deriving the tables of new",
    }


def test_another_checkpoint_under_a_locked_name(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    write_llama(project.folder / "models" / "llama", seed=7)
    refused = project.snakemake("-n")
    assert refused.returncode != 0
    assert "tiny-llama: model.safetensors of models/llama changed since it was locked" in refused.stderr
    assert "headgram lock --upgrade tiny-llama" in refused.stderr
    assert project.headgram("lock", "--upgrade", "tiny-llama").returncode == 0
    assert project.planned() == jobs(*ALL, models=["tiny-llama"])


def test_a_changed_head_of_a_large_checkpoint_is_noticed(project):
    """A sample of the file misses it; its date says where to look, even an old one, and the digest of the layer finds it."""
    folder = project.folder / "models" / "llama"
    tensors = llama_tensors(4, 4, 2, 8, 32, seed=0) | {"model.embed_tokens.weight": torch.zeros(60000, 32)}
    write_llama(folder, tensors=tensors)
    project.run()
    assert project.planned() == set()
    tensors["model.layers.2.self_attn.q_proj.weight"][8:16] = 0
    write_llama(folder, tensors=tensors)
    os.utime(folder / "model.safetensors", (0, 0))  # as `mv` and `rsync -t` bring along
    refused = project.snakemake("--cores", "1")
    assert refused.returncode != 0
    assert "tiny-llama: " in refused.stderr
    assert "changed since it was locked" in refused.stderr


def test_the_same_content_elsewhere_is_the_same(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    (project.folder / "models" / "llama").rename(project.folder / "models" / "moved")
    edit(project.folder / "config" / "models.tsv", "models/llama", "models/moved")
    assert project.planned() == set()


def test_dates_of_files_mean_nothing(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    for path in project.folder.rglob("*.pt"):
        path.touch()
    for path in project.folder.glob("workflow/scripts/*"):
        path.touch()
    assert project.planned() == set()


def test_a_lost_file_is_made_again(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    (project.folder / "results" / "atlas" / "heads" / "model=tiny-bert" / "heads.parquet").unlink()
    assert project.planned() == jobs("merge", "derive", models=["tiny-bert"])
    (project.folder / "results" / "models" / "tiny-bert" / "self" / "qk" / "eigen" / "layers-000-001.pt").write_bytes(b"cut")
    assert project.planned() == {"Spectra of tiny-bert, stack self, circuit qk, layers-000-001"} | jobs(
        "merge", "derive", models=["tiny-bert"]
    )


def test_going_back_after_losing_the_memory(finished, tmp_path):
    project: Project = finished.copy(tmp_path / "project")
    before = project.tables()
    config = project.folder / "config" / "config.yaml"
    edit(config, "topk: 8", "topk: 4")
    project.run()
    assert project.tables() != before
    shutil.rmtree(project.folder / ".snakemake")
    edit(config, "topk: 4", "topk: 8")
    assert project.planned() == jobs("eigen", "merge", "derive")
    project.run()
    assert project.tables() == before


def memory_of(project) -> Path:
    return project.folder / ".snakemake" / "metadata"


def a_memory_of(project) -> Path:
    return next(path for path in sorted(memory_of(project).rglob("*")) if path.is_file())


def test_snakemakes_memory_is_not_read_again_after_a_run(finished):
    ended = (finished.folder / "results" / ".lock").stat().st_mtime_ns
    assert all(path.stat().st_ctime_ns <= ended for path in memory_of(finished).rglob("*") if path.is_file())


def test_garbage_in_snakemakes_memory_is_one_sentence_that_helps(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    memory, path = memory_of(project), a_memory_of(project)
    whole = json.loads(path.read_text())
    wrong = ([], {**whole, "rule": 1}, {**whole, "params": [[1]]})
    for garbage in (b"\xff\xfe", *(json.dumps(content).encode() for content in wrong), None):
        path.unlink()
        if garbage is None:
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes(garbage)
            os.utime(path, (0, 0))  # its date says nothing
        done = project.snakemake("-n")
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert f"headgram: {path.relative_to(project.folder)}, where Snakemake remembers" in done.stderr
    folders = [path for path in memory.parent.iterdir() if path.is_dir()]
    assert len(folders) > 5
    for folder in (*folders, memory.parent):
        shutil.rmtree(folder)
        for make, words in (
            (Path.touch, "is no folder"),
            (lambda path: path.symlink_to("/nonexistent"), "is a link to what is not"),
        ):
            make(folder)
            done = project.snakemake("-n")
            assert done.returncode != 0
            assert "Traceback" not in done.stderr
            assert words in done.stderr
            folder.unlink()
    assert project.planned() == set()


def test_any_wrong_type_in_snakemakes_memory_is_refused(finished, tmp_path, monkeypatch):
    """Of each field that Snakemake writes, and of what lists and objects in them hold."""
    project = finished.copy(tmp_path / "project")
    monkeypatch.chdir(project.folder)
    path = a_memory_of(project)
    whole = json.loads(path.read_text())
    assert {type(whole[name]) for name in ("input", "params", "input_checksums")} == {list, dict}
    changes = [{name: {"a": [1]}} for name in whole]
    changes += [{name: [[1]]} for name, value in whole.items() if isinstance(value, list)]
    _check_snakemakes_memory(Path("results"))
    for content in ([], 0, None, "", False, [whole], *(whole | change for change in changes)):
        path.write_text(json.dumps(content))
        with pytest.raises(HeadgramError, match="where Snakemake remembers an earlier run, is damaged"):
            _check_snakemakes_memory(Path("results"))
