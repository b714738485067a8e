"""The tests for a real GPU, on a pretended one: with smaller weights, on one shape and two precisions."""

import pytest
import torch

from gpu.test_on_a_gpu import *  # noqa: F403
from headgram.geometry import routes
from stand_in import StandIn

pytestmark = []


@pytest.fixture
def shape():
    return 4, 2, 8, 40


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def crowd():
    return 16, 8, 64, 600_000


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(routes, "_LONGEST", 128)  # a CPU takes long for the longest sums
    routes.longest_sum.cache_clear()
    with StandIn() as device:
        yield device
    routes.longest_sum.cache_clear()
