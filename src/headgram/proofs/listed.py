"""Tiny random models of the types that `tiny_models.toml` lists."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headgram.errors import HeadgramError
from headgram.proofs.shrink import LARGEST_MODEL, SEED, tiny_data, tiny_overrides

NO_FLAGS: Mapping[str, bool] = {}

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
        config = AutoConfig.for_model(model_type, **tiny_overrides(model_type, {**shape, **flags}, entry))
        config._attn_implementation = config._experts_implementation = "eager"
        mappings = [modeling_auto.MODEL_MAPPING, *(getattr(modeling_auto, name) for name in _HEADS_ON_TOP)]
        classes = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
        for chosen in classes[0 if entry.get("base", True) else 1 : 2]:
            cls = chosen[0] if isinstance(chosen, tuple) else chosen
            with torch.device("meta"):
                size = sum(weight.numel() for weight in cls(config).parameters())
            if size > LARGEST_MODEL:
                raise HeadgramError(f"the tiny {cls.__name__} has {size:,} weights: tiny_models.toml leaves a size out")
            torch.manual_seed(SEED)
            model = cls(config).eval()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(0, 0.2)
            yield model, entry


@contextmanager
def saved(model: Any) -> Iterator[Path]:
    """A folder with the model as transformers saves it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)
