"""Tiny models of transformers, saved, locked and extracted as a run does it, for tests that follow them to the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headgram.forms.reading import Frames
from headgram.forms.variants import Variant
from headgram.proofs.listed import listed_models
from headgram.proofs.prove import quiet
from headgram.results.around import read_around
from headgram.results.factors import FactorFiles
from headgram.results.record import Provenance, Recipe
from headgram.stages.around import extract_around
from headgram.stages.extract import extract
from headgram.study.lock import LockedModel
from headgram.study.manifest import read_manifest
from headgram.study.resolve import resolve
from tiny import write_manifest


def tiny(model_type: str, changes: Mapping[str, Any], biased: bool = False) -> tuple[Any, dict[str, Any]]:
    """A tiny model with random weights, and its entry in the data of proofs; without biases, unless they are wanted."""
    with quiet():
        model, entry = next(listed_models(model_type, changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") and not biased:
                weight.zero_()
    return model, {"whole": False, "walked": False, **entry}


def locked(model: Any, folder: Path) -> LockedModel:
    """A saved model, and what a lock says of it."""
    with quiet():
        model.save_pretrained(folder / "m")
    return resolve(read_manifest(write_manifest(folder / "models.tsv", {"m": folder / "m"})).rows[0])


@dataclass(frozen=True)
class Extracted:
    """What a run extracts of a locked model: what stands around its heads, and factors by circuit and stack."""

    folder: Path
    entry: LockedModel
    around: tuple[Path, Path]
    around_key: str

    @property
    def frames(self) -> dict[str, Frames]:
        return read_around(*self.around, self.around_key)

    def weights(self, circuit: str, stack: str = "self") -> tuple[Path, str]:
        """A file of factors, and its key."""
        place = next(each for each in self.entry.stacks if each.name == stack)
        path = self.folder / stack / circuit / "weights" / "layers.pt"
        recipe = Recipe("extract", "{}", self.entry.fingerprint_of(circuit), "c")
        if not path.exists():
            digests = place.circuits[circuit].digests
            extract(path, self.entry.how_to_open(), place.layers, digests, "stored", Provenance(recipe, "m", stack, circuit))
        return path, recipe.key

    def form(self, name: str, stack: str = "self") -> FactorFiles:
        path, key = self.weights(Variant.of(name).circuit, stack)
        return FactorFiles([path], key, name, self.frames[stack])


def extracted(folder: Path, entry: LockedModel) -> Extracted:
    around = Provenance(Recipe("around", "{}", entry.around_fingerprint(), "c"), "m", None)
    layers = {each.name: list(zip(each.layers, each.around.digests, strict=True)) for each in entry.stacks}
    extract_around(folder / "around.pt", folder / "around.json", entry.how_to_open(), layers, around)
    return Extracted(folder, entry, (folder / "around.pt", folder / "around.json"), around.recipe.key)
