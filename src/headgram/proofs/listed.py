"""Tiny random models of the types that `tiny_models.toml` lists."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from headgram.proofs.shrink import check_size, random_model, tiny_data

NO_FLAGS: Mapping[str, bool] = {}

#: Sections of text models in two halves.
_HALVES = ("encoder", "decoder")

_HEADS_ON_TOP = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
)


def listed_models(model_type: str, flags: Mapping[str, bool] = NO_FLAGS) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The tiny models of a type, with random weights and biases, and the type's entry in `tiny_models.toml`."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    entry = tiny_data()["types"].get(model_type, {})
    for shape in entry.get("shapes", tiny_data()["shapes"]):
        config = AutoConfig.for_model(model_type, **_overrides(model_type, {**shape, **flags}, entry))
        config._attn_implementation = config._experts_implementation = "eager"
        mappings = [modeling_auto.MODEL_MAPPING, *(getattr(modeling_auto, name) for name in _HEADS_ON_TOP)]
        classes = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
        for chosen in classes[0 if entry.get("base", True) else 1 : 2]:
            cls = chosen[0] if isinstance(chosen, tuple) else chosen
            check_size(cls, config)
            yield random_model(cls, config), entry


def _overrides(model_type: str, shape: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that make a type's configuration tiny, in its sections too."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = entry.get("config", {})
    cls = CONFIG_MAPPING[model_type]
    sub_configs = getattr(cls, "sub_configs", {})
    kinds = tiny_data()["two_kinds"]
    sizes = {name: value for name, value in shape.items() if name not in sub_configs}
    small = {**tiny_data()["common"], **(kinds["config"] if model_type in kinds["types"] else {}), **sizes}
    vision = tiny_data()["vision"]
    sections = {
        name: {**(small if "text" in name or name in _HALVES else vision), **own.get(name, {}), **shape.get(name, {})}
        for name in sub_configs
        if own.get(name) != "null"
    }
    known = {item.name for item in fields(cls)} | set(cls.attribute_map)
    chosen = {**{name: value for name, value in small.items() if name in known}, **own, **sections}
    return {name: None if value == "null" else value for name, value in chosen.items()}


@contextmanager
def saved(model: Any) -> Iterator[Path]:
    """A folder with the model as transformers saves it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)
