"""What a LoRA adapter changes: its settings, and which of its tensors belong to which weight of the base.

The names and settings are those of peft: factors in files of their own (`adapter_model.safetensors`) beside
`adapter_config.json`, or in one state dict with the weights (`base_layer`, `lora_A.default`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from headgram.checkpoints.adapted_store import AdaptedStore, Change
from headgram.checkpoints.stores import TensorStore
from headgram.checkpoints.views import Joined
from headgram.checkpoints.weight_files import ADAPTER_CONFIG
from headgram.errors import HeadgramError

#: Begins the names of an adapter's tensors beside those of its base.
_ADAPTER = "adapter:"
#: What peft puts before the names of the model that it wraps.
_WRAPPED = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>[^.]+)")
#: Settings of variants whose result is not `W + s B A`, and why.
_OTHER_VARIANTS = {
    "alora_invocation_tokens": "it acts on the tokens after its invocation only",
    "arrow_config": "it is routed by the token",
    "kasa_config": "it changes singular values of its base",
    "layer_replication": "it repeats layers of its base",
    "monteclora_config": "its factors are random",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it averages its inputs by groups",
}
#: Settings of variants that change how the factors are trained, or nothing that is stored.
_KNOWN_VARIANTS = {
    "use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_config",
    "runtime_config",
}  # fmt: skip
#: Ways to begin training that leave the base as it is.
_PLAIN_STARTS = ("default", "gaussian", "eva", "orthogonal", "mica")
_LONGEST_PATTERN = 200


@dataclass(frozen=True)
class Settings:
    """What `adapter_config.json` says of all factors.

    Attributes
    ----------
    rank, alpha
        Of modules that no pattern names.
    ranks, alphas
        By regular expression of modules' names.
    stabilised
        Whether `s = alpha / sqrt(r)`.
    lengths
        Whether every row of the result gets a length of its own (DoRA).
    transposed
        Whether weights are stored `(in, out)`.
    """

    rank: float
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    stabilised: bool
    lengths: bool
    transposed: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str, base_is_changed: bool) -> Self:
        """From the file's content; `base_is_changed` if the base's weights are stored as training left them.

        Raises
        ------
        HeadgramError
            If the adapter is of another kind, or the file lacks what the sum takes.
        """
        whose = f"the {ADAPTER_CONFIG} of {where}"
        if config.get("peft_type") != "LORA":
            raise HeadgramError(
                f"{whose} has peft_type = {config.get('peft_type')!r:.60}: headgram reads LoRA and DoRA; if peft can merge "
                "it, do so"
            )
        for name, why in _OTHER_VARIANTS.items():
            if config.get(name):
                raise HeadgramError(
                    f"{whose} has {name}: headgram does not read such an adapter, since {why}; if peft can merge it, do so"
                )
        for name, value in config.items():
            if value and (name.startswith("use_") or name.endswith("_config")) and name not in _KNOWN_VARIANTS:
                raise HeadgramError(
                    f"{whose} has {name:.60}, a variant of LoRA that headgram does not know: merge it with peft first"
                )
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start not in _PLAIN_STARTS and not base_is_changed:
            raise HeadgramError(
                f"{whose} has init_lora_weights = {start!r:.60}, which changes the base before training: save the adapter with "
                "peft's `path_initial_model_for_weight_conversion`, or merge it there"
            )
        for name in ("r", "lora_alpha"):
            if not _is_number(config.get(name)):
                raise HeadgramError(f"{whose} has {name} = {config.get(name)!r:.60}, which should be a number")
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(config.get(name), bool | None):
                raise HeadgramError(f"{whose} has {name} = {config[name]!r:.60}, which should be true or false")
        return cls(
            rank=float(config["r"]),
            alpha=float(config["lora_alpha"]),
            ranks=_patterns(config, "rank_pattern", whose),
            alphas=_patterns(config, "alpha_pattern", whose),
            stabilised=bool(config.get("use_rslora")),
            lengths=bool(config.get("use_dora")),
            transposed=bool(config.get("fan_in_fan_out")),
        )

    def scale(self, module: str, rank: int) -> float:
        """`s` of a module's factors.

        Raises
        ------
        HeadgramError
            If the rank that is stored is not the one that is stated.
        """
        stated = _first_match(self.ranks, module, self.rank)
        if stated != rank:
            raise HeadgramError(
                f"the adapter's factors of {module} have rank {rank}, but {ADAPTER_CONFIG} says {stated:g}: fetch both again"
            )
        return _first_match(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.stabilised else rank)


def merged(base: TensorStore, adapter: TensorStore, config: Mapping[str, Any], where: str) -> TensorStore:
    """A base's weights, changed by an adapter that lies in files of its own.

    Parameters
    ----------
    base, adapter
        Their tensors.
    config
        What `adapter_config.json` holds.
    where
        The adapter in words, for messages.

    Raises
    ------
    HeadgramError
        If the adapter is no LoRA, or changes what the base does not have.
    """
    settings = Settings.read(config, where, base_is_changed=False)
    factors, rest = _sorted_out(adapter.names(), where)
    both = Joined(base, _ADAPTER, adapter)
    homes = _Homes(base.names(), where)
    changes: dict[str, Change] = {}
    for module, parts in factors.items():
        home = homes.find(module, needed=not config.get("target_parameters") and _is_in_a_layer(module))
        stored = {part: _ADAPTER + key for part, key in parts.items()}
        if home is not None:
            changes |= _changes_of(both, home, module, stored, settings)
        else:
            problem = (
                f"the adapter changes {module!r:.200}, which its base has under no name of its own: it may be tied to another"
            )
            changes[f"{module}.weight"] = Change(next(iter(stored.values())), problem=problem)
    for name, key in rest.items():
        module, tokens, _ = name.partition(".token_adapter.")
        leaf = "weight"
        if not tokens:
            module, _, leaf = name.rpartition(".")
        changed = f"{homes.find(module, needed=False) or module}.{leaf}"
        unread = f"the adapter changes single tokens ({name:.200}), which is not read" if tokens else None
        if changed in changes:
            raise HeadgramError(f"the adapter {where} both replaces and changes {changed!r:.200}: merge it with peft first")
        changes[changed] = Change(changed if tokens else _ADAPTER + key, problem=unread)
    if not any(name in base for name in changes):
        raise HeadgramError(f"the adapter {where} changes nothing that its base has: name the base that it belongs to")
    return AdaptedStore(both, changes, settings.transposed, base.names())


def with_adapters_merged(store: TensorStore, config: Mapping[str, Any] | None, where: str) -> TensorStore:
    """The store itself or, if it is of a model that was saved with an adapter beside its weights, with both merged.

    Raises
    ------
    HeadgramError
        If there is no `adapter_config.json` that says how, or the adapter is no LoRA.
    """
    names = store.names()
    if not any(".lora_" in name or ".base_layer." in name for name in names):
        return store
    if config is None:
        raise HeadgramError(
            f"{where} holds an adapter that is not merged, and no {ADAPTER_CONFIG} says by how much it counts: put the one that "
            "belongs to it there"
        )
    settings = Settings.read(config, where, base_is_changed=True)
    if any("^" in pattern for pattern in (*settings.ranks, *settings.alphas)) and not any(_WRAPPED in name for name in names):
        raise HeadgramError(
            f"{where} holds names without '{_WRAPPED}', so patterns of {ADAPTER_CONFIG} that begin with '^' match "
            "nothing: save it with peft"
        )
    factors, rest = _sorted_out(names, where)
    plain = {name.replace(".base_layer.", "."): key for name, key in rest.items()}
    changes = {name: Change(key, problem=_lost(key, where)) for name, key in plain.items() if name != key}
    for module, parts in factors.items():
        for name, change in _changes_of(store, module, module, parts, settings).items():
            if name not in plain:
                raise HeadgramError(
                    f"{where} holds an adapter's factors of {module!r:.200}, but not the weight that they change: fetch it again"
                )
            changes[name] = replace(change, base=plain[name])
    return AdaptedStore(store, changes, settings.transposed, plain)


class _Homes:
    """Where a base keeps a module that an adapter names: under the same name, or under another prefix."""

    def __init__(self, names: Collection[str], where: str) -> None:
        self._names = {name.rpartition(".")[0] for name in names if name.endswith((".weight", ".bias"))}
        self._where = where
        self._by_tail: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            self._by_tail[_tail(name)].append(name)
        self._prefixes: dict[str, str] = {}

    def find(self, module: str, needed: bool) -> str | None:
        """The base's name of a module.

        Raises
        ------
        HeadgramError
            If it has several that might be meant, or none though it is needed.
        """
        if module in self._names:
            return module
        tail = _tail(module)
        prefix = module.removesuffix(tail)
        found = self._by_tail.get(tail, [])
        if prefix in self._prefixes:
            found = [name for name in found if name == self._prefixes[prefix] + tail]
        if len(found) == 1:
            self._prefixes[prefix] = found[0].removesuffix(tail)
            return found[0]
        if found or needed:
            what = f"several modules that might be meant ({', '.join(sorted(found)[:2])})" if found else "no such module"
            raise HeadgramError(
                f"the adapter {self._where} changes {module!r:.200}, but the base has {what}: name the right one as "
                "`base` in the manifest, or merge the adapter with peft first"
            )
        return None


def _lost(key: str, where: str) -> str | None:
    """Why a weight under `base_layer` cannot be read without the factors that change it; None for any other name."""
    module, wrapped, _ = key.rpartition(_WRAPPED)[2].rpartition(".base_layer.")
    return f"{where} holds base_layer of {module!r:.200}, but not the factors that change it: save all of it" if wrapped else None


def _is_in_a_layer(module: str) -> bool:
    return any(part.isdecimal() for part in module.split("."))


def _tail(module: str) -> str:
    """A module's name from the list of layers on: `layers.0.self_attn.q_proj`; its last part if it is in none."""
    parts = module.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[max(0, first - 1) :])


def _sorted_out(names: Iterable[str], where: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Factors by module and part, and all other tensors by the name that they have in the model."""
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    rest: dict[str, str] = {}
    adapters: set[str | None] = set()
    saved: set[str | None] = set()
    for key in names:
        name = key.rpartition(_WRAPPED)[2]
        if ".original_module." in name:
            continue  # a copy of what `modules_to_save` replaces
        if found := _FACTOR.fullmatch(name):
            part = "bias" if found["leaf"] == "bias" else found["part"]
            if part in factors[found["module"]]:
                raise HeadgramError(f"{where} holds {part} of {found['module']!r:.200} twice: save one adapter alone")
            factors[found["module"]][part] = key
            adapters.add(found["adapter"])
        elif found := _SAVED.fullmatch(name):
            rest[f"{found['module']}.{found['leaf']}"] = key
            saved.add(found["adapter"])
        elif ".lora_" in name or ".parametrizations." in name:
            raise HeadgramError(
                f"{where} holds {name!r:.200}, which headgram does not know as a part of LoRA or DoRA: merge the "
                "adapter with peft first"
            )
        elif name in rest:
            raise HeadgramError(f"{where} holds {name!r:.200} twice: save one adapter alone")
        else:
            rest[name] = key
    named = (adapters | saved) - {None}
    if len(adapters) > 1 or len(named) > 1:
        known = ", ".join(sorted(str(adapter) for adapter in adapters | saved))
        raise HeadgramError(f"{where} holds several adapters ({known:.200}): save the one that is meant alone")
    return factors, rest


def _changes_of(store: TensorStore, home: str, module: str, parts: Mapping[str, str], settings: Settings) -> dict[str, Change]:
    """What a module's factors make of its weight, and of its bias."""
    weight = {part: key for part, key in parts.items() if part != "bias"}
    embedding = any("embedding" in part for part in weight)
    for part in ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B"):
        if part not in weight:
            raise HeadgramError(f"the adapter has no {part} of {module!r:.200}: fetch it again")
    if settings.lengths != ("lora_magnitude_vector" in weight):
        raise HeadgramError(
            f"the adapter has {'no' if settings.lengths else 'a'} lora_magnitude_vector of {module!r:.200}, while its "
            f"{ADAPTER_CONFIG} says use_dora = {settings.lengths}: they are of two adapters"
        )
    problem = f"the embedding {module!r:.200} is changed by DoRA, which is not read" if embedding and settings.lengths else None
    rank = next(iter(store.shape(weight["lora_embedding_A" if embedding else "lora_A"])), 0)
    scale = settings.scale(module, rank)
    changes = {f"{home}.weight": Change(f"{home}.weight", weight, scale, problem)}
    if "bias" in parts:
        changes[f"{home}.bias"] = Change(f"{home}.bias", {"bias": parts["bias"]}, scale)
    return changes


def _patterns(config: Mapping[str, Any], name: str, whose: str) -> dict[str, float]:
    """Regular expressions and their numbers. Expressions that may take long to search for are refused."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, Mapping) or not all(_is_number(value) for value in patterns.values()):
        raise HeadgramError(f"{whose} gives something else than numbers in {name}: correct it")
    for pattern in patterns:
        costly = len(pattern) > _LONGEST_PATTERN or len(re.findall(r"[*+?{]", pattern)) > 3 or re.search(r"\)[*+?{]", pattern)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            costly = True
        if costly:
            raise HeadgramError(f"{whose} has the {name} {pattern!r:.100}, which is costly to search for: write the names out")
    return {str(pattern): float(value) for pattern, value in patterns.items()}


def _first_match(patterns: Mapping[str, float], module: str, default: float) -> float:
    """As peft's `get_pattern_key`: the first expression that is the end of a module's name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**31
