"""Blocks of heads on a pretended GPU: they bound its memory, and are halved where it runs out."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

from headgram.errors import HeadgramError
from headgram.geometry import blocks
from headgram.geometry.costs import BLOCK_BYTES
from headgram.results.factors import FactorFiles, write_factors
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.results.tables import SIDES, read_table
from headgram.stages.composition import Composed, compose
from headgram.stages.extracted import ExtractedModel
from headgram.stages.gram import measure_row
from headgram.stages.lineage import Measured, measure
from headgram.study.options import Config
from stand_in import StandIn

HEADS, RANK, WIDTH = 4, 8, 256
LAYER = 4 * HEADS * RANK * WIDTH
OPTIONS = Config.model_validate({"composition": {"strongest": 3}})


@dataclass(frozen=True)
class Weights:
    """Extracted weights of some layers; two heads share each key and value."""

    folder: Path
    layers: int
    circuits: dict[str, Path]
    keys: dict[str, str]

    @classmethod
    def of(cls, folder: Path, layers: int, seed: int = 0) -> "Weights":
        chance, circuits, keys = torch.Generator().manual_seed(seed), {}, {}
        for circuit, roles in (("qk", ("query", "key")), ("ov", ("output", "value"))):
            extract, path = Recipe("extract", "{}", circuit, "c"), folder / f"{circuit}.pt"
            shapes = zip(roles, (HEADS, HEADS // 2), strict=True)
            write_factors(
                path, range(layers), {role: torch.randn(layers, n, RANK, WIDTH, generator=chance) for role, n in shapes}
            )
            seal(record_of(path), Provenance(extract, "m", "self", circuit), [path])
            circuits[circuit], keys[circuit] = path, extract.key
        return cls(folder, layers, circuits, keys)

    def provenance(self, stage: str, *circuits: str) -> Provenance:
        upstream = tuple(self.keys[circuit] for circuit in circuits)
        return Provenance(Recipe(stage, "{}", "f", "c", upstream), "m", "self", circuits[0], "cuda")


def composition(weights: Weights, name: str) -> list[pd.DataFrame]:
    folder = weights.folder / name
    folder.mkdir()
    tables = [folder / f"{name}.parquet" for name in ("composition", "channels", "kernels")]
    sources = ExtractedModel({"self": {circuit: [path] for circuit, path in weights.circuits.items()}}, weights.keys, {})
    composed = Composed(*tables, folder / "directions.pt", folder / "record.json")
    compose(sources, composed, OPTIONS, weights.provenance("composition", "qk", "ov"))
    kernels = read_table(tables[2]).to_pandas()
    places = [f"{name}_{side}" for side in "ab" for name in ("role", "layer", "head")]
    return [read_table(tables[0]).to_pandas(), kernels.sort_values(places, ignore_index=True)]


def gram(weights: Weights, name: str) -> list[pd.DataFrame]:
    path, half = weights.folder / f"{name}.parquet", weights.layers // 2
    tiles = [range(half), range(half, weights.layers)]
    measure_row(path, [weights.circuits["qk"]], tiles, True, OPTIONS.gram, weights.provenance("gram", "qk"))
    return [read_table(path).to_pandas()]


def lineage(weights: Weights, name: str) -> list[pd.DataFrame]:
    folder = weights.folder / name
    folder.mkdir()
    chance, both = torch.Generator().manual_seed(0), []
    for model in (weights, Weights.of(folder, weights.layers, seed=1)):
        files = FactorFiles([model.circuits["qk"]], model.keys["qk"], "qk")
        layers = [
            {side: torch.linalg.qr(torch.randn(HEADS, WIDTH, 4, generator=chance))[0].mT for side in SIDES} for _ in files.layers
        ]
        both.append(Measured(files, layers))
    return [measure(("qk", "self"), *both, True, "cuda")["matches"].to_pandas()]


STAGES = {each.__name__: each for each in (composition, gram, lineage)}


@pytest.fixture(autouse=True)
def _blocks_of_layers(monkeypatch):
    monkeypatch.setattr(blocks, "LEAST_BLOCK", LAYER // HEADS)
    monkeypatch.setitem(BLOCK_BYTES, "cuda", 4 * LAYER)


@pytest.mark.parametrize("share", [0.8, 0.45])
@pytest.mark.parametrize("stage", STAGES)
def test_where_memory_runs_out_blocks_are_halved(tmp_path, monkeypatch, stage, share, caplog):
    monkeypatch.setitem(BLOCK_BYTES, "cuda", 16 * LAYER)
    weights = Weights.of(tmp_path, 16)
    with StandIn() as device:
        known = STAGES[stage](weights, "known")
    with StandIn(memory=share * device.peak):
        found = STAGES[stage](weights, "found")
    assert "memory ran out" in caplog.text
    for one, other in zip(found, known, strict=True):
        pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_where_memory_does_not_suffice_for_the_smallest_block_it_is_said(tmp_path, stage):
    weights = Weights.of(tmp_path, 4)
    with StandIn(memory=LAYER / 2), pytest.raises(HeadgramError, match="There is too little memory for one head"):
        STAGES[stage](weights, "found")
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("stage", STAGES)
def test_twice_as_many_layers_need_no_more_memory(tmp_path, stage):
    peaks = []
    for layers in (8, 16):
        weights = Weights.of(tmp_path / str(layers), layers)
        with StandIn() as device:
            STAGES[stage](weights, "found")
        peaks.append(device.peak)
    results = 3 * 8 * (16 * HEADS) ** 2  # numbers of pairs are small beside weights of a real width
    assert peaks[1] < 1.05 * peaks[0] + results
