"""Quantised checkpoints, presented as if they were not.

A quantised weight lies on disk as several tensors (packed integers, scales, zeros). The store here shows them as one
float32 tensor under the plain name, so that architectures and layouts need not know. `quantization_config` in
config.json names the method; a weight that lacks the method's tensors is plain, as many methods leave some.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headgram.checkpoints.stores import TensorStore, bytes_of
from headgram.checkpoints.unpacking import awq_weight, fp8_weight, gptq_weight
from headgram.checkpoints.views import View
from headgram.errors import HeadgramError

Config = Mapping[str, Any]
Parts = dict[str, Tensor]
#: Methods that leave queries and keys as they are; transformers saves what it read from GGUF dequantised, and calls it so.
_PLAIN_ATTENTION = ("mxfp4", "gguf")
_LARGEST_QUANT_STATE = 2**16
_MOST_VALUES_PER_BYTE = 8


@dataclass(frozen=True)
class Scheme:
    """How a method stores a weight `NAME.weight`.

    Attributes
    ----------
    marker
        A weight is quantised if the tensor `NAME.<marker>` is there.
    others
        What else it may consist of.
    shape
        From the shapes of the parts, a reader of a part and the method's settings to the shape of the weight.
    decode
        From the parts, the settings and the module's name to the weight, float32.
    """

    marker: str
    others: tuple[str, ...]
    shape: Callable[[dict[str, tuple[int, ...]], Callable[[str], Tensor], Config], tuple[int, ...]]
    decode: Callable[[Parts, Config, str], Tensor]


class QuantisedStore(View):
    """A store over another one, with weights in place of what they are quantised to."""

    def __init__(self, store: TensorStore, method: str, settings: Config) -> None:
        super().__init__(store)
        self._method = method
        self._settings = settings

    def __contains__(self, name: str) -> bool:
        return bool(self._parts(name)) or name in self._store

    def names(self) -> Collection[str]:
        return dict.fromkeys(self._plain_name(name) for name in self._store.names())

    def shape(self, name: str) -> tuple[int, ...]:
        scheme, parts = self._scheme(name), self._parts(name)
        if scheme is None:
            return self._store.shape(name)
        shapes = {part: self._store.shape(key) for part, key in parts.items()}
        shape: tuple[int, ...] = _guarded(
            name, self._method, lambda: scheme.shape(shapes, lambda part: self._small(parts[part]), self._settings)
        )
        if any(size < 0 for size in shape) or math.prod(shape) > _MOST_VALUES_PER_BYTE * self.nbytes(name):
            raise HeadgramError(
                f"tensor {name} claims shape {shape}, which is more than the {self.nbytes(name)} bytes stored of it"
            )
        return shape

    def dtype(self, name: str) -> str:
        return self._method if self._parts(name) else self._store.dtype(name)

    def read(self, name: str) -> Tensor:
        scheme, keys = self._scheme(name), self._parts(name)
        if scheme is None:
            return self._store.read(name)
        shape = self.shape(name)
        parts = {part: self._store.part(key) for part, key in keys.items()}
        weight: Tensor = _guarded(name, self._method, lambda: scheme.decode(parts, self._settings, name.removesuffix(".weight")))
        if tuple(weight.shape) != shape:
            raise HeadgramError(f"tensor {name}: its {self._method} parts decode to shape {tuple(weight.shape)}, not {shape}")
        return weight

    def sources(self, name: str) -> list[str]:
        return list(self._parts(name).values()) or [name]

    def _scheme(self, name: str) -> Scheme | None:
        """The first scheme of the method whose marker is there."""
        stem = name.removesuffix("weight")
        found = (scheme for scheme in SCHEMES[self._method] if stem + scheme.marker in self._store)
        return next(found, None) if name.endswith(".weight") else None

    def _plain_name(self, key: str) -> str:
        """The weight that a marker announces, or the key itself."""
        for scheme in SCHEMES[self._method]:
            if key.endswith(f".{scheme.marker}"):
                return f"{key.removesuffix(scheme.marker)}weight"
        return key

    def _parts(self, name: str) -> dict[str, str]:
        """Part -> key on disk; empty for a plain tensor."""
        scheme, stem = self._scheme(name), name.removesuffix("weight")
        every = (scheme.marker, *scheme.others) if scheme else ()
        return {part: stem + part for part in every if stem + part in self._store}

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
    if not method or method in _PLAIN_ATTENTION:
        return store
    if method not in SCHEMES:
        raise HeadgramError(
            f"the weights are quantised by '{method:.60}', which headgram does not read; it reads {', '.join(SCHEMES)}"
        )
    return QuantisedStore(store, method, settings)


def _settings(config: Config) -> Config:
    """`quantization_config` of the model or, in a multimodal one, of its text model."""
    text = config.get("text_config")
    for owner in (config, text if isinstance(text, dict) else {}):
        settings = owner.get("quantization_config")
        if isinstance(settings, dict):
            return settings
    return {}


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


def _whole(settings: Config, keys: tuple[str, ...], allowed: tuple[int, ...], default: int | None = None) -> int:
    value = next((settings[key] for key in keys if key in settings), default)
    if isinstance(value, bool) or value not in allowed:
        raise HeadgramError(f"quantization_config has {keys[0]} = {value!r}; headgram reads {', '.join(map(str, allowed))}")
    return int(value)


def _same_shape(shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], settings: Config) -> tuple[int, ...]:
    return shapes["weight"]


def _decode_fp8(parts: Parts, settings: Config, module: str) -> Tensor:
    block = settings.get("weight_block_size") or (128, 128)
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(isinstance(size, int) and 0 < size < 2**20 for size in block)
    ):
        raise HeadgramError(f"quantization_config has weight_block_size = {block!r}, which should be two whole numbers")
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    return fp8_weight(parts["weight"], scale, (block[0], block[1]))


def _awq_shape(shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], settings: Config) -> tuple[int, ...]:
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise HeadgramError(f"quantization_config has version = {settings['version']!r}; of AWQ's, headgram reads 'gemm'")
    _whole(settings, ("bits", "w_bit"), (4,), default=4)
    inputs, words = shapes["qweight"]
    return words * 8, inputs


def _decode_awq(parts: Parts, settings: Config, module: str) -> Tensor:
    return awq_weight(parts["qweight"], parts["qzeros"], parts["scales"])


def _gptq_shape(shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], settings: Config) -> tuple[int, ...]:
    words, outputs = shapes["qweight"]
    return outputs, words * 32 // _whole(settings, ("bits",), (2, 4, 8))


def _decode_gptq(parts: Parts, settings: Config, module: str) -> Tensor:
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1  # the first format stores zeros minus one
    bits = _whole(settings, ("bits",), (2, 4, 8))
    return gptq_weight(parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx"), bits, offset)


def _compressed_shape(shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], settings: Config) -> tuple[int, ...]:
    if settings.get("transform_config") or "weight_g_idx" in shapes:
        raise HeadgramError(
            "compressed-tensors weights that are rotated (transform_config) or reordered (weight_g_idx) are not read"
        )
    if "weight_shape" in shapes:
        return tuple(int(size) for size in read("weight_shape").tolist())
    if "weight_packed" in shapes:  # two 4-bit floats in a byte
        rows, columns = shapes["weight_packed"]
        return rows, 2 * columns
    return shapes["weight"]


def _decode_compressed(parts: Parts, settings: Config, module: str) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config = QuantizationConfig.model_validate(dict(settings))
    schemes = [group for group in config.config_groups.values() if group.weights is not None]
    scheme = next(group for group in schemes if any(target == "Linear" or match_name(module, target) for target in group.targets))
    compressor = BaseCompressor.get_value_from_registry(scheme.format or infer_module_format(torch.nn.Linear, scheme))
    # The library computes in the scale's precision: in float32, nothing is rounded a second time.
    scale = parts["weight_scale"]
    state = parts | ({"weight_scale": scale.float()} if scale.dtype in (torch.bfloat16, torch.float16) else {})
    weight: Tensor = compressor.decompress(state, scheme)["weight"]
    return weight.to(torch.float32)


def _nf4_shape(shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], settings: Config) -> tuple[int, ...]:
    state = next(part for part in shapes if "quant_state" in part)
    return tuple(int(size) for size in json.loads(bytes(bytes_of(read(state))))["shape"])


def _decode_4bit(parts: Parts, settings: Config, module: str) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tables = {part.removeprefix("weight."): tensor for part, tensor in parts.items() if part != "weight"}
    state = QuantState.from_dict(tables, torch.device("cpu"))
    packed = parts["weight"].reshape(-1).view(torch.uint8)
    _check_blocks(state, 16, 2 * len(packed), math.prod(state.shape))
    if state.nested:
        _check_blocks(state.state2, 256, state.absmax.numel(), state.absmax.numel())
    state.dtype = torch.float32
    weight: Tensor = dequantize_4bit(packed.unsqueeze(1), state)
    return weight


def _check_blocks(state: Any, codes: int, stored: int, wanted: int) -> None:
    """Refuse tables that are too short: the library's kernels would read past their ends."""
    blocks = -(-wanted // state.blocksize) if isinstance(state.blocksize, int) and state.blocksize > 0 else math.inf
    if stored < wanted or state.code.numel() != codes or state.absmax.numel() < blocks:
        raise ValueError("a table is too short")


def _decode_8bit(parts: Parts, settings: Config, module: str) -> Tensor:
    return parts["weight"].to(torch.float32) * parts["SCB"].to(torch.float32).unsqueeze(1) / 127


_GPTQ_PARTS = ("qzeros", "scales", "g_idx")
_4BIT_PARTS = ("weight", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
#: By `quant_method`.
SCHEMES = {
    "fp8": (Scheme("weight_scale_inv", ("weight",), _same_shape, _decode_fp8),),
    "fbgemm_fp8": (Scheme("weight_scale", ("weight",), _same_shape, _decode_fp8),),
    "compressed-tensors": (
        Scheme(
            "weight_scale",
            ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
            _compressed_shape,
            _decode_compressed,
        ),
    ),
    "awq": (Scheme("qweight", ("qzeros", "scales"), _awq_shape, _decode_awq),),
    "gptq": (Scheme("qweight", _GPTQ_PARTS, _gptq_shape, _decode_gptq),),
    "bitsandbytes": (
        Scheme(
            "weight.absmax",
            (*_4BIT_PARTS, "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
            _nf4_shape,
            _decode_4bit,
        ),
        Scheme("SCB", ("weight",), _same_shape, _decode_8bit),
    ),
}
