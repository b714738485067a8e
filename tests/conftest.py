"""Shapes on the signatures of the geometry are checked while the tests run."""

import os

import hypothesis
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
install_import_hook(["headgram.forms.heads", "headgram.forms.transforms", "headgram.geometry"], "beartype.beartype")

hypothesis.settings.register_profile("headgram", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("headgram")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[("cpu",), ()], ids=["one by one", "at once"])
def both_ways(request):
    """Computes as on a CPU, and then as on a GPU: all heads at once, by the routines that are used there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headgram.geometry.blocks.ONE_BY_ONE", request.param)
        yield


@pytest.fixture(scope="module")
def chrome():
    """A browser."""
    from browser import browser

    with browser() as running:
        yield running
