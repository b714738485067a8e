"""The registry of families: data files beside this module, read once, checked strictly."""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, Field, field_validator

from headgram.architectures.layouts import LAYOUTS
from headgram.errors import HeadgramError

_FOLDER = files("headgram.architectures")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StackRule(_Entry):
    """One run of attention layers: where its tensors are, and what the checkpoint's config calls its head counts."""

    name: str
    layout: str
    tensors: dict[str, str]  # role -> key below the prefix; `{layer}` stands for the layer's index
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = None  # None: as many key heads as query heads
    hidden: str = "hidden_size"
    head_dim: str | None = None  # None, or absent from the config: hidden / heads

    @field_validator("layout")
    @classmethod
    def _known_layout(cls, value: str) -> str:
        if value not in LAYOUTS:
            raise ValueError(f"unknown layout {value!r}")
        return value


class GgufRule(_Entry):
    """The family in llama.cpp's naming."""

    architectures: tuple[str, ...]
    permuted: bool = False  # llama.cpp's converter reordered the rows of q and k
    tensors: dict[str, str] = Field(default={"query": "blk.{layer}.attn_q.weight", "key": "blk.{layer}.attn_k.weight"})


class Family(_Entry):
    """One family of architectures."""

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]  # where the base model may sit inside the checkpoint
    stacks: tuple[StackRule, ...]
    gguf: GgufRule | None = None


@cache
def families() -> tuple[Family, ...]:
    """Every family, by name."""
    names = sorted(item.name.removesuffix(".toml") for item in _FOLDER.iterdir() if item.name.endswith(".toml"))
    return tuple(Family(name=name, **tomllib.loads(family_text(name))) for name in names)


def family_text(name: str) -> str:
    """A family's data file, as it is; what weights are read with it depend on every byte."""
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def family_of(model_type: str) -> Family:
    """The family that owns a `model_type` of transformers.

    Raises
    ------
    HeadgramError
        If no family does.
    """
    return _find(model_type, {name: family for family in families() for name in family.model_types}, "model type")


def family_of_gguf(architecture: str) -> Family:
    """The family that owns a GGUF `general.architecture`.

    Raises
    ------
    HeadgramError
        If no family does.
    """
    owners = {name: family for family in families() if family.gguf for name in family.gguf.architectures}
    return _find(architecture, owners, "GGUF architecture")


def _find(name: str, owners: dict[str, Family], what: str) -> Family:
    if name not in owners:
        near = difflib.get_close_matches(name, owners, n=1)
        hint = f" (the nearest known one is '{near[0]}')" if near else ""
        raise HeadgramError(
            f"the {what} '{name}' is not known{hint}; add it to a file in src/headgram/architectures/ "
            "or set `model_type` in the manifest to a known type with the same layout"
        )
    return owners[name]
