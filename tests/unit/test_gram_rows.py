"""A row of tiles resumes at the tile where it stopped."""

import pytest
import torch

import headgram.stages.gram as stage
from headgram.results.factors import write_factors
from headgram.results.record import Identity, Provenance, record_of, seal
from headgram.results.tables import read_table
from headgram.study.options import Gram

pytestmark = pytest.mark.usefixtures("both_ways")

CONFIG = Gram(precision="auto")
TILES = [[0, 1], [2, 3], [4, 5]]


@pytest.fixture
def weights(tmp_path):
    generator = torch.Generator().manual_seed(0)
    extract = Identity("extract", "{}", "f", "c")
    path = tmp_path / "weights" / "layers-000-005.pt"
    write_factors(
        path,
        range(6),
        {"query": torch.randn(6, 4, 3, 8, generator=generator), "key": torch.randn(6, 2, 3, 8, generator=generator)},
    )
    seal(record_of(path), Provenance(extract, "m", "self"), [path])
    return path, Provenance(Identity("gram", "{}", "f", "c", (extract.key,)), "m", "self")


def test_finished_tiles_are_kept(tmp_path, weights, monkeypatch):
    path, provenance = weights
    stage.measure_row(tmp_path / "whole" / "row-000.parquet", [path], TILES, CONFIG, provenance)
    expected = (tmp_path / "whole" / "row-000.parquet").read_bytes()

    calls = []
    compute = stage._tile

    def dies_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    row = tmp_path / "killed" / "row-000.parquet"
    monkeypatch.setattr(stage, "_tile", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        stage.measure_row(row, [path], TILES, CONFIG, provenance)
    assert sorted(file.name for file in row.parent.iterdir()) == [
        f".row-000.parquet-tile-{tile}" for tile in ("000-001-000-001", "000-001-002-003")
    ]

    tile = row.parent / ".row-000.parquet-tile-000-001-002-003"
    damaged = bytearray(tile.read_bytes())
    damaged[40] ^= 1
    tile.write_bytes(damaged)
    calls.clear()
    monkeypatch.setattr(stage, "_tile", lambda *arguments: calls.append(1) or compute(*arguments))
    stage.measure_row(row, [path], TILES, CONFIG, provenance)
    assert len(calls) == 2  # the damaged tile and the missing one, not the finished one
    assert row.read_bytes() == expected
    assert sorted(file.name for file in row.parent.iterdir()) == ["row-000.json", "row-000.parquet"]


def test_the_same_job_of_a_killed_run_may_end_meanwhile(tmp_path, weights, monkeypatch):
    """It removes the tiles that both wrote, when its row is whole."""
    path, provenance = weights
    row = tmp_path / "row-000.parquet"
    compute = stage._tile

    def the_other_ends(*arguments):
        for tile in tmp_path.glob("*-tile-*"):
            tile.unlink()
        return compute(*arguments)

    stage.measure_row(row, [path], TILES, CONFIG, provenance)
    expected = row.read_bytes()
    monkeypatch.setattr(stage, "_tile", the_other_ends)
    stage.measure_row(row, [path], TILES, CONFIG, provenance)
    assert row.read_bytes() == expected
    assert not list(tmp_path.glob("*-tile-*"))


def test_upper_triangle_only(tmp_path, weights):
    path, provenance = weights
    row = tmp_path / "row-001.parquet"
    stage.measure_row(row, [path], TILES[1:], CONFIG, provenance)
    pairs = {(a, b) for a, b in zip(*(read_table(row)[name].to_pylist() for name in ("layer_a", "layer_b")), strict=True)}
    assert pairs == {(2, 2), (2, 3), (3, 3), (2, 4), (2, 5), (3, 4), (3, 5)}


def test_tiles_of_another_configuration_are_not_taken(tmp_path, weights, monkeypatch):
    path, provenance = weights
    other = Provenance(Identity("gram", "{}", "f", "another", provenance.identity.upstream), "m", "self")
    row = tmp_path / "row-000.parquet"
    monkeypatch.setattr(stage, "seal", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stage.measure_row(row, [path], TILES, CONFIG, other)
    monkeypatch.undo()
    calls = []
    compute = stage._tile
    monkeypatch.setattr(stage, "_tile", lambda *arguments: calls.append(1) or compute(*arguments))
    stage.measure_row(row, [path], TILES, CONFIG, provenance)
    assert len(calls) == 3
