"""The same pins everywhere, for every Python that is promised."""

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
