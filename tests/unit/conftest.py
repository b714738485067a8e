"""Fixtures of several modules. Each imports what it needs when it is used: most modules need none of that."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest

pytest.register_assert_rewrite("at_the_hub", "forged_results", "hostile_files", "quantised_files")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that runs here, in the place of the real one."""
    from hub_server import serving
    from huggingface_hub import constants

    from headgram.checkpoints import answers

    with serving() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr(answers, "_LONGEST_PAUSE", 0.01)
        yield server


@pytest.fixture
def bounded_memory():
    """A file that asks for much more than it holds fails here, instead of filling the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def results(tmp_path) -> Path:
    """Results of one model that was never measured."""
    from forged_results import made

    return made(tmp_path / "results")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[str]:
    """What verify says of the tables of one row as they are: their numbers are made up."""
    from forged_results import made, sentences

    results = made(tmp_path_factory.mktemp("whole") / "results")
    return [sentence.replace(str(results), "") for sentence in sentences(results)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A base and a plain adapter of it."""
    from adapter_files import adapter, base

    folder = tmp_path_factory.mktemp("pair")
    adapter(folder / "adapter", base(folder / "base"))
    return folder


@pytest.fixture
def pair(original, tmp_path):
    """A copy of both, which a test may change."""
    from adapter_files import change

    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path
