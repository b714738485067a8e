"""The chaos suite in short; `make chaos` is the long form, with every fault."""

import pytest

from pipeline import chaos
from pipeline.arena import Figures, new_arena


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    figures = Figures()
    yield new_arena(tmp_path_factory.mktemp("chaos") / "project", seed=0, figures=figures)
    print(figures)


def test_a_damaged_cache(arena):
    chaos.damaged_cache(arena, [("eigen", "*.pt")], [chaos.truncate, None])


def test_kills_at_random_moments(arena):
    chaos.random_kills(arena)


def test_a_full_disk(arena):
    chaos.full_disk(arena, ("merge",))


def test_two_runs_in_two_folders(arena):
    chaos.two_runs(arena, [False])
