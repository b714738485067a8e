"""A row of tiles resumes at the tile where it stopped."""

import os
import random
import signal
import time

import pandas as pd
import pytest
import torch

import headgram.stages.gram as stage
from headgram.geometry.costs import BLOCK_BYTES
from headgram.results.factors import write_factors
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.results.tables import read_table
from headgram.study.options import Gram

pytestmark = pytest.mark.usefixtures("both_ways")

CONFIG = Gram(precision="auto")
TILES = [[0, 1], [2, 3], [4, 5]]


@pytest.fixture(params=[True, False], ids=["all pairs", "same index"])
def every(request):
    return request.param


def _compute(every):
    return "_all_pairs" if every else "_same_index"


@pytest.fixture
def weights(tmp_path):
    generator = torch.Generator().manual_seed(0)
    extract = Recipe("extract", "{}", "f", "c")
    path = tmp_path / "weights" / "layers-000-005.pt"
    write_factors(
        path,
        range(6),
        {"query": torch.randn(6, 4, 3, 8, generator=generator), "key": torch.randn(6, 2, 3, 8, generator=generator)},
    )
    seal(record_of(path), Provenance(extract, "m", "self", "qk"), [path])
    return path, Provenance(Recipe("gram", "{}", "f", "c", (extract.key,)), "m", "self", "qk")


def test_finished_tiles_are_kept(every, tmp_path, weights, monkeypatch):
    path, provenance = weights
    stage.measure_row(tmp_path / "whole" / "row-000.parquet", [path], TILES, every, CONFIG, provenance)
    expected = (tmp_path / "whole" / "row-000.parquet").read_bytes()

    calls = []
    compute = getattr(stage, _compute(every))

    def dies_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    row = tmp_path / "killed" / "row-000.parquet"
    monkeypatch.setattr(stage, _compute(every), dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        stage.measure_row(row, [path], TILES, every, CONFIG, provenance)
    assert sorted(file.name for file in row.parent.iterdir()) == [
        f".row-000.parquet-tile-{tile}" for tile in ("000-001-000-001", "000-001-002-003")
    ]

    tile = row.parent / ".row-000.parquet-tile-000-001-002-003"
    damaged = bytearray(tile.read_bytes())
    damaged[40] ^= 1
    tile.write_bytes(damaged)
    calls.clear()
    monkeypatch.setattr(stage, _compute(every), lambda *arguments: calls.append(1) or compute(*arguments))
    stage.measure_row(row, [path], TILES, every, CONFIG, provenance)
    assert len(calls) == 2  # the damaged tile and the missing one, not the finished one
    assert row.read_bytes() == expected
    assert sorted(file.name for file in row.parent.iterdir()) == ["row-000.json", "row-000.parquet"]


def test_kills_at_random_moments_inside_a_row_lose_no_finished_tile(every, tmp_path, weights, monkeypatch):
    """A copy of this process measures the row, and is killed as `kill -9` does, until one comes to the end."""
    path, provenance = weights
    tiles = [[layer] for layer in range(6)]
    stage.measure_row(tmp_path / "whole" / "row-000.parquet", [path], tiles, every, CONFIG, provenance)
    expected = (tmp_path / "whole" / "row-000.parquet").read_bytes()
    row = tmp_path / "killed" / "row-000.parquet"
    compute, begun = getattr(stage, _compute(every)), tmp_path / "begun"

    def slowly(source, own, other, *arguments):
        with begun.open("a") as file:
            file.write(f"{other[0]:03d}\n")
        time.sleep(0.02)
        return compute(source, own, other, *arguments)

    monkeypatch.setattr(stage, _compute(every), slowly)
    moments = random.Random(0)
    kills = 0
    while not record_of(row).exists():
        finished = {file.name[-3:] for file in row.parent.glob(".*-tile-*-???")}
        begun.write_text("")
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                stage.measure_row(row, [path], tiles, every, CONFIG, provenance)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, 0.1 + 0.02 * kills))  # longer where the machine is slow
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        assert kills < 100
        assert not finished & set(begun.read_text().split())  # what was finished was not begun again
    assert kills > 2
    assert row.read_bytes() == expected


def test_the_same_job_of_a_killed_run_may_end_meanwhile(every, tmp_path, weights, monkeypatch):
    """It removes the tiles that both wrote, when its row is whole."""
    path, provenance = weights
    row = tmp_path / "row-000.parquet"
    compute = getattr(stage, _compute(every))

    def the_other_ends(*arguments):
        for tile in tmp_path.glob("*-tile-*"):
            tile.unlink()
        return compute(*arguments)

    stage.measure_row(row, [path], TILES, every, CONFIG, provenance)
    expected = row.read_bytes()
    monkeypatch.setattr(stage, _compute(every), the_other_ends)
    stage.measure_row(row, [path], TILES, every, CONFIG, provenance)
    assert row.read_bytes() == expected
    assert not list(tmp_path.glob("*-tile-*"))


def test_upper_triangle_only(every, tmp_path, weights):
    path, provenance = weights
    row = tmp_path / "row-001.parquet"
    stage.measure_row(row, [path], TILES[1:], every, CONFIG, provenance)
    columns = [read_table(row)[name].to_pylist() for name in ("layer_a", "head_a", "layer_b", "head_b")]
    pairs = [((a, h), (b, i)) for a, h, b, i in zip(*columns, strict=True)]
    heads = [(layer, head) for layer in range(2, 6) for head in range(4)]
    wanted = {(a, b) for a in heads[:8] for b in heads if a <= b and (every or a[1] == b[1])}
    assert set(pairs) == wanted
    assert len(pairs) == len(wanted)


def test_blocks_of_any_size_give_the_same(every, tmp_path, weights, monkeypatch):
    """Of several layers, of one, and of some heads of a layer."""
    path, provenance = weights
    found = []
    for size in (2**30, 4 * 3 * 8 * 4 * 2, 4 * 3 * 8 * 4, 4 * 3 * 8 * 3):
        monkeypatch.setitem(BLOCK_BYTES, "cpu", size)
        row = tmp_path / f"row-{size:03d}.parquet"
        stage.measure_row(row, [path], [[0, 1, 2], [3, 4, 5]], every, CONFIG, provenance)
        found.append(read_table(row).to_pandas())
    for other in found[1:]:
        pd.testing.assert_frame_equal(other, found[0], rtol=1e-5, atol=1e-4)


def test_tiles_of_another_configuration_are_not_taken(every, tmp_path, weights, monkeypatch):
    path, provenance = weights
    other = Provenance(Recipe("gram", "{}", "f", "another", provenance.recipe.upstream), "m", "self", "qk")
    row = tmp_path / "row-000.parquet"
    monkeypatch.setattr(stage, "seal", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stage.measure_row(row, [path], TILES, every, CONFIG, other)
    monkeypatch.undo()
    calls = []
    compute = getattr(stage, _compute(every))
    monkeypatch.setattr(stage, _compute(every), lambda *arguments: calls.append(1) or compute(*arguments))
    stage.measure_row(row, [path], TILES, every, CONFIG, provenance)
    assert len(calls) == 3
