"""Quantised checkpoints, presented as if they were not.

A quantised weight lies on disk as several tensors (packed integers, scales, zeros). The store here shows them as one
float32 tensor under the plain name, so that architectures and layouts need not know. `quantization_config` in
config.json names the method; a weight that lacks the method's tensors is plain, as many methods leave some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from headgram.checkpoints.dtypes import FLOATS
from headgram.checkpoints.stores import TensorStore, cut_of
from headgram.checkpoints.views import View
from headgram.errors import HeadgramError
from headgram.families.layouts import Cut

if TYPE_CHECKING:
    from torch import Tensor

    from headgram.checkpoints.schemes import Config, Scheme

#: What transformers calls models that it read from GGUF and saved dequantised.
_PLAIN = ("gguf",)
_LARGEST_QUANT_STATE = 2**16
_MOST_VALUES_PER_BYTE = 8


class QuantisedStore(View):
    """A store over another one, with weights in place of what they are quantised to."""

    def __init__(self, store: TensorStore, method: str, schemes: Sequence[Scheme], settings: Config) -> None:
        super().__init__(store)
        self._method = method
        self._known = schemes
        self._settings = settings

    def is_stored(self, name: str) -> bool:
        return not self._parts(name)

    def __contains__(self, name: str) -> bool:
        return bool(self._parts(name)) or name in self._store

    def names(self) -> Collection[str]:
        return dict.fromkeys(self._plain_name(name) for name in self._store.names())

    def shape(self, name: str) -> tuple[int, ...]:
        self._check_whole(name)
        scheme, parts = self._scheme(name), self._parts(name)
        if scheme is None:
            return self._store.shape(name)
        from headgram.checkpoints.schemes import Stored

        looked_at = parts | self._present(name, scheme.beside)
        stored = Stored(
            {part: self._store.shape(key) for part, key in looked_at.items()},
            {part: self._store.stored(key) for part, key in looked_at.items()},
            lambda part: self._small(looked_at[part]),
        )
        shape: tuple[int, ...] = _guarded(name, self._method, lambda: scheme.shape(stored, self._settings))
        if any(size < 0 for size in shape) or math.prod(shape) > _MOST_VALUES_PER_BYTE * self.nbytes(name):
            raise HeadgramError(
                f"tensor {name} claims shape {shape}, which is more than the {self.nbytes(name)} bytes stored of it"
            )
        return shape

    def dtype(self, name: str) -> str:
        self._check_whole(name)
        return self._method if self._parts(name) else self._store.dtype(name)

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        scheme, keys = self._scheme(name), self._parts(name)
        if scheme is None:
            return self._store.read(name, cut)
        shape = self.shape(name)
        parts = {part: self._store.part(key) for part, key in keys.items()}
        weight: Tensor = _guarded(name, self._method, lambda: scheme.decode(parts, self._settings, name.removesuffix(".weight")))
        if tuple(weight.shape) != shape:
            raise HeadgramError(f"tensor {name}: its {self._method} parts decode to shape {tuple(weight.shape)}, not {shape}")
        return cut_of(weight, cut)

    def sources(self, name: str) -> list[str]:
        return list(self._parts(name).values()) or [name]

    def _check_whole(self, name: str) -> None:
        """Refuse a quantised weight of which a part is missing."""
        stem = name.removesuffix("weight")
        markers = [scheme.marker for scheme in self._schemes(name)]
        if len(markers) > 1:
            raise HeadgramError(
                f"tensor {name} has two kinds of scales, {' and '.join(markers)}, and nothing says which is meant: "
                "remove one of them"
            )
        scheme, parts = self._scheme(name), self._parts(name)
        if scheme and name in self._store and ("weight" not in parts or "weight_packed" in parts):
            raise HeadgramError(
                f"tensor {name} is there plain and quantised, and nothing says which is meant: remove one of them"
            )
        if lacking := [part for part in (scheme.needs if scheme else ()) if part not in parts]:
            raise HeadgramError(f"tensor {name} is quantised, and its part {lacking[0]} is missing: fetch the checkpoint again")
        if not scheme and name.endswith(".weight") and name in self._store and self._store.stored(name) not in FLOATS:
            wanted = " or ".join(stem + scheme.marker for scheme in self._known)
            raise HeadgramError(
                f"tensor {name} is stored as {self._store.stored(name)}, but its scale is missing: there is no "
                f"{wanted}; fetch the checkpoint again"
            )

    def _scheme(self, name: str) -> Scheme | None:
        return next(iter(self._schemes(name)), None)

    def _schemes(self, name: str) -> list[Scheme]:
        """The schemes of the method whose markers stand beside a weight."""
        stem = name.removesuffix("weight")
        known = self._known if name.endswith(".weight") else ()
        return [scheme for scheme in known if stem + scheme.marker in self._store]

    def _plain_name(self, key: str) -> str:
        """The weight that a marker announces, or the key itself."""
        for scheme in self._known:
            if key.endswith(f".{scheme.marker}"):
                return f"{key.removesuffix(scheme.marker)}weight"
        return key

    def _parts(self, name: str) -> dict[str, str]:
        """Part -> key on disk; empty for a plain tensor."""
        scheme = self._scheme(name)
        return self._present(name, (scheme.marker, *scheme.others)) if scheme else {}

    def _present(self, name: str, parts: tuple[str, ...]) -> dict[str, str]:
        stem = name.removesuffix("weight")
        return {part: stem + part for part in parts if stem + part in self._store}

    def _small(self, key: str) -> Tensor:
        """A part that says what shape the weight has, which must not itself be large."""
        if self._store.nbytes(key) > _LARGEST_QUANT_STATE:
            raise ValueError(f"{key} is too large")
        return self._store.part(key)


def with_plain_weights(store: TensorStore, config: Config | None) -> TensorStore:
    """The store itself, or one that undoes the quantisation that the configuration declares.

    Raises
    ------
    HeadgramError
        If the method is unknown.
    """
    settings = _settings(config or {})
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else ""))
    if method.startswith("modelopt"):  # `modelopt_fp4` and the like say in short what `quant_algo` says
        method = "modelopt"
    if not method or method in _PLAIN:
        return store
    from headgram.checkpoints.schemes import SCHEMES

    if method not in SCHEMES:
        raise HeadgramError(
            f"the weights are quantised by '{method:.60}', which headgram does not read; it reads {', '.join(SCHEMES)}, "
            "and weights that are not quantised"
        )
    return QuantisedStore(store, method, SCHEMES[method], settings)


def _settings(config: Config) -> Config:
    """`quantization_config` of the model or, in a multimodal one, of its text model.

    Raises
    ------
    HeadgramError
        If both are there, and name different methods.
    """
    text = config.get("text_config")
    owners = (config, text if isinstance(text, dict) else {})
    found = [settings for owner in owners if isinstance(settings := owner.get("quantization_config"), dict)]
    methods = [settings.get("quant_method") for settings in found]
    if len(found) == 2 and methods[0] != methods[1]:
        raise HeadgramError(
            f"config.json states quant_method = {methods[0]!r:.60}, and in its text_config {methods[1]!r:.60}: remove one"
        )
    return found[0] if found else {}


def _guarded(name: str, method: str, work: Callable[[], Any]) -> Any:
    """Parts that do not fit each other fail in as many ways as there are libraries; all mean the same to the user."""
    try:
        return work()
    except ImportError as error:
        raise HeadgramError(
            f"tensor {name} is stored in the format of {method}: `pip install headgram[quantised]` to read it ({error})"
        ) from None
    except HeadgramError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise HeadgramError(f"tensor {name} cannot be decoded as {method}: its parts do not fit together ({reason})") from None
