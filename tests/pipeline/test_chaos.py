"""Every fault of the chaos suite, once; `make chaos` is the long form."""

import pytest

from pipeline import chaos


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    figures = chaos.Figures()
    yield chaos.new_arena(tmp_path_factory.mktemp("chaos") / "project", seed=0, figures=figures)
    print(figures)


def test_kills_at_random_moments(arena):
    chaos.random_kills(arena)


def test_orphans_that_still_write(arena):
    chaos.orphans(arena, ("gram",))


def test_a_damaged_cache(arena):
    chaos.damaged_cache(arena, (("eigen", "*.pt"),))


def test_a_full_disk(arena):
    chaos.full_disk(arena, ("merge",))


def test_a_replaced_checkpoint(arena):
    chaos.replaced_checkpoint(arena)


def test_read_only_results(arena):
    chaos.read_only_results(arena)


def test_two_runs_at_once(arena):
    chaos.two_runs(arena)
