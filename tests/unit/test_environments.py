"""The same pins everywhere, for every Python that is promised."""

import ast
import re
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ENVS = Path(__file__).parents[2] / "envs"


def pins(path: Path) -> set[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {line.lower().replace("_", "-") for line in lines if line}


def test_every_direct_pin_is_in_the_full_list():
    assert pins(ENVS / "requirements.in") <= pins(ENVS / "requirements.txt")
    assert pins(ENVS / "requirements-dev.in") | pins(ENVS / "requirements.txt") <= pins(ENVS / "requirements-dev.txt")


@pytest.mark.parametrize("name", ["requirements.in", "requirements-dev.in"])
def test_every_direct_dependency_is_pinned_and_justified(name):
    lines = [line for line in (ENVS / name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]* *# \S.{4,}", line), line


@pytest.mark.parametrize("path", sorted(ENVS.glob("requirements*.txt")), ids=lambda path: path.name)
def test_everything_that_follows_is_pinned(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.\[\]-]+==[0-9][A-Za-z0-9.+!-]*", line), line


def test_what_the_package_imports_is_a_direct_dependency():
    source = ENVS.parent / "src" / "headgram"
    trees = [ast.parse(path.read_bytes()) for path in source.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    imported = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"headgram"}
    direct = {line.split("==")[0] for name in ("requirements.in", "requirements-dev.in") for line in pins(ENVS / name)}
    extras = tomllib.loads((ENVS.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    direct |= {re.split(r"[<>=]", package)[0] for packages in extras.values() for package in packages}
    called = {
        "cupy": "cupy-cuda13x",
        "yaml": "pyyaml",
        "pydantic_core": "pydantic",
        "snakemake_interface_logger_plugins": "snakemake",
        "vl_convert": "vl-convert-python",
    }
    assert {called.get(name, name).lower().replace("_", "-") for name in imported} <= direct


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_conda_environments_have_the_direct_pins(name):
    packages = yaml.safe_load((ENVS / f"{name}.yaml").read_text())["dependencies"][-1]["pip"]
    found = {package.lower().replace("_", "-") for package in packages if not package.startswith("--")}
    assert found == pins(ENVS / "requirements.in")


def test_pins_install_on_the_oldest_python_that_is_promised():
    """Pins that were resolved on a newer Python may refuse Debian's 3.11.2."""
    names = [pin.split("==")[0] for pin in sorted(pins(ENVS / "requirements-dev.txt"))]
    wants = {name: metadata(name)["Requires-Python"] or ">=3" for name in names}
    assert not {name: python for name, python in wants.items() if "3.11.2" not in SpecifierSet(python)}
