"""What a checkpoint is declared to be: by its configuration, or by the manifest where that is silent or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgram.checkpoints.bases import AnyLocation
from headgram.errors import HeadgramError
from headgram.families.registry import Family, family_of, with_towers

#: What a manifest may state when a checkpoint does not, or states it wrongly; the last four are numbers.
OVERRIDES = ("model_type", "base", "prefix", "heads", "kv_heads", "head_dim", "twin")

LONGEST_NAME = 100


def checked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest states.

    Raises
    ------
    HeadgramError
        If it is nothing that can be stated.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if unknown := set(given) - set(OVERRIDES):
        raise HeadgramError(f"unknown override '{sorted(unknown)[0]}'; there are: {', '.join(OVERRIDES)}")
    for key, value in given.items():
        if key in OVERRIDES[3:] and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise HeadgramError(f"the override {key} is {value!r:.60}, which should be a positive whole number")
    return given


def declared_family(
    location: AnyLocation, config: dict[str, Any] | None, given: Mapping[str, Any], derived: Family | None = None
) -> tuple[str, Family, dict[str, Any]]:
    """The type that a configuration names, its family (the derived one, if there is one), and the configuration.

    Raises
    ------
    HeadgramError
        If it names none, or none that is known.
    """
    if config is None and "model_type" not in given:
        raise HeadgramError(f"{location.where} has no config.json: add it, or set `model_type` and `heads` in the manifest")
    config = config or {}
    architecture = given.get("model_type") or config.get("model_type")
    if not isinstance(architecture, str) or len(architecture) > LONGEST_NAME:
        raise HeadgramError(f"the config.json of {location.where} names no model_type: set `model_type` in the manifest")
    family = derived or family_of(architecture)
    if not family.stacks:
        towers = family.towers
        if family.text:
            architecture = _text_type(config, architecture)
            family = family_of(architecture)
        family = with_towers(family, towers, config, architecture)
        if not family.stacks:
            parts = [part.get("model_type") for tower in towers if isinstance(part := config.get(tower.config), dict)]
            raise HeadgramError(
                f"no part of this '{architecture}' checkpoint is of a known type: its config.json names {parts!r:.200}"
            )
    stated = config.get("model_type")
    if architecture not in family.model_types or (stated is not None and given.get("model_type") not in (None, stated)):
        family = family.without_surroundings(f"the checkpoint is read with the layout of '{architecture}' alone, another type")
    return architecture, family, config


def _text_type(config: Mapping[str, Any], architecture: str) -> str:
    """The type of a multimodal model's text tower."""
    tower = config.get("text_config")
    name = tower.get("model_type") if isinstance(tower, Mapping) else None
    if not isinstance(name, str) or len(name) > LONGEST_NAME:
        raise HeadgramError(
            f"the config.json of this '{architecture}' checkpoint names no text tower's type: set `model_type` in the manifest"
        )
    return name
