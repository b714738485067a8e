"""Rotary frequencies out of a checkpoint's configuration, as transformers computes them, in float64.

Scalings: linear; dynamic (NTK, by the length of the context); llama3; YaRN (Peng et al., 2023); LongRoPE (Ding et al., 2024);
proportional (Gemma 4). Multimodal encodings (`mrope`) are plain for text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headgram.checkpoints.dimensions import Section
from headgram.errors import HeadgramError
from headgram.families.around import RotaryRule

if TYPE_CHECKING:
    from headgram.forms.reading import Rotary

#: Of each plane, radians per token, in float64.
Frequencies = np.ndarray[tuple[int], np.dtype[np.float64]]
#: What configurations that state no base leave unsaid.
_BASE = 10_000
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Planes:
    """How one layer turns its queries and keys, as `headgram.forms.reading.Rotary`, but without torch."""

    frequencies: Frequencies
    interleaved: bool
    start: int
    factor: float

    def rotary(self) -> Rotary:
        """With a tensor of frequencies."""
        import torch

        from headgram.forms.reading import Rotary

        return Rotary(torch.from_numpy(self.frequencies), self.interleaved, self.start, self.factor)


@dataclass(frozen=True)
class _Parameters:
    """What a configuration states of one layer's rotary encoding."""

    stated: Mapping[str, Any]
    section: Section
    rank: int  # the rows of a head of which `partial_rotary_factor` is a share
    width: int  # those that turn
    base: float

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number among the parameters, or in the configuration.

        Raises
        ------
        HeadgramError
            If it is none, or neither states it and there is no default.
        """
        value = self.stated.get(name)
        value = self.section.get(name) if value is None else value
        if value is None and default is not None:
            return default
        return positive(self.section, name, value)

    def optional(self, name: str) -> float | None:
        return None if self.stated.get(name) is None else self.number(name)

    def inverse(self, base: float | None = None) -> Frequencies:
        """Frequencies without scaling; Python's powers are the same on every processor, NumPy's are not."""
        base = base or self.base
        return np.array([base ** (-row / self.width) for row in range(0, self.width, 2)])

    @property
    def trained(self) -> float:
        """The length of the context before it was extended."""
        name = "original_max_position_embeddings"
        own = self.section.get(name)
        return positive(self.section, name, own) if own is not None else self.number(name, self.number("max_position_embeddings"))

    def exceeded(self, length: int | None) -> bool:
        """Whether a context is longer than those of the training."""
        return length is not None and length > self.trained


def positive(section: Section, name: str, value: Any) -> float:
    """A number of a configuration.

    Raises
    ------
    HeadgramError
        If it is not a positive finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise HeadgramError(f"{section.whose} has {name} = {value!r:.60}, which should be a positive number")
    return float(value)


def _kind(rule: RotaryRule, section: Section, layer: int) -> str | None:
    """What the configuration calls the layer in `layer_types`; None if it does not say."""
    kinds = section.get("layer_types")
    if isinstance(kinds, list):
        return kinds[layer] if layer < len(kinds) and isinstance(kinds[layer], str) else None
    return None if (full := _is_full(rule, section, layer)) is None else _FULL if full else _SLIDING


def _in_prefix(rule: RotaryRule, section: Section, layer: int) -> bool:
    """Whether the layer is one of the first, dense layers, which have rotary encoding whatever `layer_types` says."""
    if rule.prefix is None:
        return False
    kinds = section.get("mlp_layer_types")
    if isinstance(kinds, list):
        return layer < len(kinds) and kinds[layer] == "dense"
    return layer < (section.find(rule.prefix, 0) or 0)


def _is_full(rule: RotaryRule, section: Section, layer: int) -> bool | None:
    """Whether the layer has full attention, where one layer of every `period` has it; None where there is no period."""
    layer -= (section.find(rule.prefix, 0) or 0) if rule.prefix else 0
    period = (section.find(rule.every) if rule.every else None) or rule.period
    return None if period is None else layer % period == rule.phase % period


def planes_of(rule: RotaryRule, section: Section, layer: int, rank: int, start: int, length: int | None) -> Planes | None:
    """How a layer turns its heads' rows from row `start` on, in contexts of some length; None if it does not.

    Raises
    ------
    HeadgramError
        If the configuration does not say, or says something that is not known.
    """
    if rule.kind == "none" or any(section.get(name) != value for name, value in rule.when.items()):
        return None
    kind = _kind(rule, section, layer)
    if rule.flags and not _flag(rule, section, layer):
        return None
    if rule.only and not (rule.unless_null and section.get(rule.unless_null) is None) and not _in_prefix(rule, section, layer):
        if kind is None:
            raise HeadgramError(f"{section.whose} does not state `layer_types`, of which {rule.only} alone has rotary encoding")
        if kind != rule.only:
            return None
    stated = _stated(section, kind)
    own = section.get("rope_parameters")
    if rule.local_base and own and isinstance(own, Mapping) and not any(isinstance(value, Mapping) for value in own.values()):
        raise HeadgramError(f"{section.whose} has one set of rotary parameters, and its model reads one for each kind of layer")
    local = rule.local_base and kind == _SLIDING
    if local and not isinstance(own, Mapping):
        stated = {}  # older scalings are of full layers alone
    names = (rule.local_base,) if local else rule.bases
    bases = [stated.get("rope_theta"), *(section.get(name) for name in names if name)]
    base = next((value for value in bases if value is not None), _BASE)
    if rule.by_layer and section.get(rule.by_layer) is not None:
        base = section.get(f"{rule.by_layer}.{layer}")
        if base == 0:
            return None
    base = positive(section, "the rotary base", base)
    name = str(stated.get("rope_type") or stated.get("type") or "default")[:40]
    name = rule.renamed.get(name, name)
    if name not in _SCALINGS:
        raise HeadgramError(f"{section.whose} scales its rotary encoding by '{name}', which is not known")
    rank -= start
    shares = [stated.get("partial_rotary_factor"), *(section.get(name) for name in ("rotary_pct", "partial_rotary_factor"))]
    reads_share = _SCALINGS[name] is not _default if rule.share is None else rule.share
    share = next((value for value in shares if value is not None), None) if reads_share else None
    width = (section.find(rule.width) if rule.width else None) or rank
    width = width if share is None else int(rank * min(positive(section, "the rotary share", share), rank + 1))
    if not 0 < width <= rank:
        raise HeadgramError(f"{section.whose} turns {width} of {rank} rows, which cannot be")
    given = _Parameters(stated, section, rank, width, base)
    try:
        with np.errstate(all="ignore"):
            frequencies, factor = _SCALINGS[name](given, length)
        whole = bool(np.isfinite(frequencies).all()) and math.isfinite(factor)
    except (ArithmeticError, TypeError, ValueError):
        whole = False
    if not whole:
        raise HeadgramError(f"{section.whose} scales its rotary encoding by numbers that give no frequencies: {stated!r:.200}")
    if 2 * len(frequencies) > rank:
        raise HeadgramError(f"{section.whose} turns {len(frequencies)} pairs of {rank} rows, which cannot be")
    if rule.factors and _SCALINGS[name] is not _default:
        factor = given.number("long_mscale" if given.exceeded(length) else "short_mscale")
    return Planes(rule.sign * frequencies, rule.kind == "interleaved", start, factor)


def _flag(rule: RotaryRule, section: Section, layer: int) -> bool:
    assert rule.flags is not None
    flags = section.get(rule.flags)
    if isinstance(flags, list) and layer < len(flags):
        return bool(flags[layer])
    if flags in (None, []) and (full := _is_full(rule, section, layer)) is not None:
        return not full
    raise HeadgramError(f"{section.whose} should have a list {rule.flags} with an entry for every layer")


def _stated(section: Section, kind: str | None) -> Mapping[str, Any]:
    """The parameters of one kind of layer: those that the configuration states for it, or for all."""
    found = section.get("rope_scaling") or section.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise HeadgramError(f"{section.whose} has rotary parameters {found!r:.60}, which should be a table")
    if any(isinstance(value, Mapping) for value in found.values()):
        own = found.get(kind) if kind is not None else None
        if not isinstance(own, Mapping):
            kinds = ", ".join(map(str, found))[:100]
            raise HeadgramError(f"{section.whose} has rotary parameters for {kinds}, and none for '{kind}'")
        return own
    return found


def _default(given: _Parameters, length: int | None) -> tuple[Frequencies, float]:
    return given.inverse(), 1.0


def _linear(given: _Parameters, length: int | None) -> tuple[Frequencies, float]:
    return given.inverse() / given.number("factor"), 1.0


def _dynamic(given: _Parameters, length: int | None) -> tuple[Frequencies, float]:
    """By the length of the context, where that exceeds what the model was trained on."""
    factor, longest = given.number("factor"), given.number("max_position_embeddings")
    ratio = factor * max(length or 0, longest) / longest - (factor - 1)
    return given.inverse(given.base * ratio ** (given.width / (given.width - 2))), 1.0


def _llama3(given: _Parameters, length: int | None) -> tuple[Frequencies, float]:
    plain, factor, trained = given.inverse(), given.number("factor"), given.trained
    low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
    turns = trained * plain / (2 * math.pi)  # of a plane within the context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain, 1.0


def _yarn(given: _Parameters, length: int | None) -> tuple[Frequencies, float]:
    trained = given.trained
    factor = given.number("factor", given.number("max_position_embeddings", trained) / trained)
    scale = given.optional("attention_factor")
    if scale is None:
        some, every = given.stated.get("mscale"), given.stated.get("mscale_all_dim")
        scale = mscale(factor, some) / mscale(factor, every) if some and every else mscale(factor)
    plain = given.inverse()

    def plane(turns: float) -> float:
        return given.width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(given.base))

    low, high = plane(given.number("beta_fast", 32)), plane(given.number("beta_slow", 1))
    if given.stated.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, given.width - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low or 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), scale


def _longrope(given: _Parameters, length: int | None) -> tuple[Frequencies, float]:
    """One set of factors for contexts up to the trained length, another for longer ones."""
    trained = given.trained
    name = "long_factor" if given.exceeded(length) else "short_factor"
    factors = given.stated.get(name)
    if not isinstance(factors, list) or len(factors) != given.width // 2:
        raise HeadgramError(f"{given.section.whose} should have a list {name} of {given.width // 2} numbers")
    own = np.array([positive(given.section, name, value) for value in factors])
    factor = given.optional("factor") or given.number("max_position_embeddings") / trained
    scale = given.optional("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return given.inverse() / own, scale


def _proportional(given: _Parameters, length: int | None) -> tuple[Frequencies, float]:
    """Frequencies of all rows, of which the slowest are none."""
    whole = _Parameters(given.stated, given.section, given.rank, given.rank, given.base).inverse()
    whole[given.width // 2 :] = 0
    return whole / given.number("factor", 1.0), 1.0


def mscale(factor: float, share: Any = 1) -> float:
    """YaRN's factor of attention."""
    return 0.1 * float(share) * math.log(factor) + 1 if factor > 1 else 1.0


_SCALINGS: dict[str, Callable[[_Parameters, int | None], tuple[Frequencies, float]]] = {
    "default": _default,
    "mrope": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
    "proportional": _proportional,
}
