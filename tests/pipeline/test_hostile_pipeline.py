"""What strangers wrote reaches no shell, no interpreter and no template, all the way through a real run."""

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
