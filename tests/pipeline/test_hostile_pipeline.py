"""What strangers wrote reaches no shell, no interpreter and no template, all the way through a real run."""

import os

import pytest

from tiny import write_llama, write_manifest

SOURCE = "models/$(touch executed) `touch executed`; touch executed; {executed} ' \" % \\"


def test_a_source_is_never_a_command(project):
    write_llama(project.folder / SOURCE)
    write_manifest(project.folder / "config" / "models.tsv", {"odd": SOURCE})
    project.run("--until", "extract")
    assert (project.folder / "results" / "models" / "odd" / "self" / "qk" / "weights" / "layers-000-003.pt").exists()
    assert not list(project.folder.rglob("executed"))


def test_a_package_is_not_imported(project):
    package = project.folder / "src" / "bomb"
    write_llama(package / "model")
    (package / "__init__.py").write_text("import pathlib; pathlib.Path('executed').touch()")
    write_manifest(project.folder / "config" / "models.tsv", {"odd": "package:bomb/model"})
    assert project.headgram("lock").returncode == 0
    assert not list(project.folder.rglob("executed"))


@pytest.mark.parametrize(
    "text",
    [
        "__use_yte__: true\n__variables__:\n  x: ?__import__('os').system('touch executed')\n",
        "__use_yte__: true\n?if __import__('os').system('touch executed'):\n  device: cpu\n",
        "device: !!python/object/apply:os.system ['touch executed']\n",
    ],
)
def test_templates_in_the_configuration_are_not_evaluated(project, text):
    (project.folder / "config" / "config.yaml").write_text(text)
    done = project.snakemake("-n")
    assert done.returncode != 0
    assert "headgram: " in done.stderr
    assert not list(project.folder.rglob("executed"))


def test_an_old_bash_is_named_before_any_job(project, monkeypatch):
    """That of macOS knows no arrays with names, in which Snakemake tells a Bash script its job."""
    old = project.folder / "old" / "bash"
    old.parent.mkdir()
    old.write_text('#!/bin/sh\ncase "$*" in *"declare -A"*) exit 2;; esac\nexec /bin/bash "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{old.parent}:{os.environ['PATH']}")
    write_llama(project.folder / "models" / "llama")
    write_manifest(project.folder / "config" / "models.tsv", {"llama": "models/llama"})
    done = project.snakemake("--cores", "1")
    assert done.returncode != 0
    assert "headgram: Jobs are started by Bash 4 or newer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((project.folder / "results").rglob("*.pt"))
