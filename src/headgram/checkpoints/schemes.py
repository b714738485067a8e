"""How each method of quantisation stores a weight, and what the parts mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headgram.checkpoints.dtypes import FLOATS, bytes_of
from headgram.checkpoints.scaled import Block, reading_of, scaled_weight
from headgram.checkpoints.unpacking import HQQ_PACKINGS, awq_weight, gptq_weight, hqq_weight
from headgram.errors import HeadgramError
from headgram.foreign import is_costly

#: Recipes of one expression for each module of a layer have fewer.
_MOST_EXPRESSIONS = 1_000
Config = Mapping[str, Any]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """What the files say of a weight's parts: shapes and types by part, and a reader of a small one."""

    shapes: dict[str, tuple[int, ...]]
    words: dict[str, str]
    read: Callable[[str], Tensor]


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
        From what the files say of the parts and the method's settings to the shape of the weight.
    decode
        From the parts, the settings and the module's name to the weight, float32.
    needs
        Which of the others must be there.
    beside
        What may stand beside these, and only says whether they can be read.
    """

    marker: str
    others: tuple[str, ...]
    shape: Callable[[Stored, Config], tuple[int, ...]]
    decode: Callable[[Parts, Config, str], Tensor]
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def _whole(settings: Config, keys: tuple[str, ...], allowed: tuple[int, ...], default: int | None = None) -> int:
    value = next((settings[key] for key in keys if key in settings), default)
    if isinstance(value, bool) or value not in allowed:
        raise HeadgramError(f"quantization_config has {keys[0]} = {value!r}; headgram reads {', '.join(map(str, allowed))}")
    return int(value)


def _blocks(settings: Config) -> tuple[Block, ...]:
    block = settings.get("weight_block_size") or (128, 128)
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(isinstance(size, int) and 0 < size < 2**20 for size in block)
    ):
        raise HeadgramError(f"quantization_config has weight_block_size = {block!r:.100}, which should be two whole numbers")
    return ((block[0], block[1]),)


def _scaled(marker: str, weight: str = "weight", packed: tuple[str, ...] = ()) -> Scheme:
    """A weight in small floats or integers, and a scale; of those in half a byte, the kinds that the method has."""
    stem = weight.removesuffix("_qdata")
    zeros, before = f"{stem}_zero_point", ("pre_quant_scale", f"{stem}_act_pre_scale")
    more = ("weight_scale_2", *before, zeros, f"{stem}_per_tensor_scale")

    def shape(stored: Stored, settings: Config) -> tuple[int, ...]:
        _check_algorithm(settings)
        words, shapes = stored.words, stored.shapes
        first, *rest = shapes[weight]  # gpt-oss keeps groups in an axis of their own
        reading = reading_of(words[weight], (first, math.prod(rest)), words[marker], shapes[marker], _blocks(settings))
        if (reading.packed and reading.packed not in packed) or more[-1] in shapes:
            raise HeadgramError(
                f"headgram does not read weights in {words[weight]} with scales in {words[marker]} of this method"
            )
        if (words[marker] == "F8_E4M3") != ("weight_scale_2" in shapes):
            stands = "lack the second scale" if words[marker] == "F8_E4M3" else "have a second scale"
            raise HeadgramError(f"weights with scales in {words[marker]} {stands}, weight_scale_2: fetch the checkpoint again")
        return reading.shape

    def decode(parts: Parts, settings: Config, module: str) -> Tensor:
        if zeros in parts and bool(parts[zeros].count_nonzero()):
            raise HeadgramError(f"the weight of {module} has zero points, which headgram does not read of this method")
        second, columns = parts.get("weight_scale_2"), next((parts[part] for part in before if part in parts), None)
        return scaled_weight(parts[weight].flatten(1), parts[marker], _blocks(settings), second, columns)

    return Scheme(marker, (weight, *more), shape, decode, needs=(weight,))


def _check_algorithm(settings: Config) -> None:
    """Refuse algorithms of modelopt whose weights are more than numbers with scales."""
    layers = settings.get("quantized_layers")
    own = layers.values() if isinstance(layers, Mapping) else ()
    for algorithm in (each.get("quant_algo") for each in (settings, *own) if isinstance(each, Mapping)):
        if isinstance(algorithm, str) and algorithm not in _MODELOPT:
            raise HeadgramError(f"the weights are quantised by modelopt's {algorithm:.60}; headgram reads {', '.join(_MODELOPT)}")


def _format(settings: Config, keys: tuple[str, ...], allowed: tuple[str, ...]) -> str:
    """The format that a configuration states under one of several names; the first of those that are read if under none."""
    stated = {key: settings[key] for key in keys if settings.get(key) is not None}
    for key, value in stated.items():
        if not isinstance(value, str) or value.lower() not in allowed:
            raise HeadgramError(f"quantization_config has {key} = {value!r:.60}; headgram reads {', '.join(allowed)}")
    found = sorted({value.lower() for value in stated.values()})
    if len(found) > 1:
        raise HeadgramError(f"quantization_config states both {' and '.join(found)} as the format: remove the one that is wrong")
    return found[0] if found else allowed[0]


def _groups(scales: Tensor, inputs: int, settings: Config) -> Tensor:
    """The group of each input. A group has as many inputs as is stated, the last maybe fewer; or else equally many."""
    stated = next((settings[key] for key in ("group_size", "q_group_size") if settings.get(key) is not None), None)
    size = inputs if stated == -1 else inputs / len(scales) if stated is None else stated
    if isinstance(size, str) or size < 1 or size != int(size) or math.ceil(inputs / size) != len(scales):
        raise ValueError(f"{len(scales)} groups of {inputs} inputs, of group_size {stated}")
    return torch.arange(inputs) // int(size)


def _awq_shape(stored: Stored, settings: Config) -> tuple[int, ...]:
    _format(settings, ("version", "format", "checkpoint_format"), ("gemm",))
    if settings.get("backend") == "llm-awq":
        raise HeadgramError("quantization_config has backend = 'llm-awq', of which headgram does not read the format")
    _whole(settings, ("bits", "w_bit"), (4,), default=4)
    inputs, words = stored.shapes["qweight"]
    return words * 8, inputs


def _decode_awq(parts: Parts, settings: Config, module: str) -> Tensor:
    groups = _groups(parts["scales"], len(parts["qweight"]), settings)
    return awq_weight(parts["qweight"], parts["qzeros"], parts["scales"], groups)


def _gptq_shape(stored: Stored, settings: Config) -> tuple[int, ...]:
    words, outputs = stored.shapes["qweight"]
    return outputs, words * 32 // _whole(settings, ("bits",), (2, 4, 8))


def _decode_gptq(parts: Parts, settings: Config, module: str) -> Tensor:
    if settings.get("desc_act") is True and "g_idx" not in parts:
        raise HeadgramError(
            f"the inputs of {module:.200} are in no order of groups (desc_act), and its g_idx is missing: fetch it again"
        )
    if settings.get("is_marlin_format"):
        raise HeadgramError("quantization_config has is_marlin_format = True; headgram reads gptq, gptq_v2")
    stored = _format(settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    offset = 1 if stored == "gptq" else 0  # the first format stores zeros minus one
    bits = _whole(settings, ("bits",), (2, 4, 8))
    groups = parts["g_idx"] if "g_idx" in parts else _groups(parts["scales"], len(parts["qweight"]) * 32 // bits, settings)
    return gptq_weight(parts["qweight"], parts["qzeros"], parts["scales"], groups, bits, offset)


def _hqq_shape(stored: Stored, settings: Config) -> tuple[int, ...]:
    packing = _text(stored.read("packing"))
    if packing not in HQQ_PACKINGS:
        raise HeadgramError(f"weights of HQQ are packed as {packing!r:.60}; headgram reads {', '.join(HQQ_PACKINGS)}")
    return tuple(int(size) for size in stored.read("shape").tolist())


def _decode_hqq(parts: Parts, settings: Config, module: str) -> Tensor:
    shape = tuple(parts["shape"].tolist())
    return hqq_weight(parts["W_q"], parts["scale"], parts["zero"], shape, _text(parts["packing"]))


def _text(codes: Tensor) -> str:
    """A text as HQQ stores it in safetensors: as numbers of its letters."""
    return "".join(map(chr, codes.tolist()))


def _compressed_shape(stored: Stored, settings: Config) -> tuple[int, ...]:
    if settings.get("transform_config") or "weight_g_idx" in stored.shapes:
        raise HeadgramError(
            "headgram does not read weights of compressed-tensors that are rotated (transform_config) or reordered (weight_g_idx)"
        )
    if stored.words.get("weight") in FLOATS:
        raise HeadgramError(
            f"weights of compressed-tensors are stored in {stored.words['weight']} beside their scales, and so not rounded yet: "
            "save the model compressed"
        )
    if "weight_shape" in stored.shapes:
        return tuple(int(size) for size in stored.read("weight_shape").tolist())
    if "weight_packed" in stored.shapes:  # two 4-bit floats in a byte
        rows, columns = stored.shapes["weight_packed"]
        return rows, 2 * columns
    return stored.shapes["weight"]


def _decode_compressed(parts: Parts, settings: Config, module: str) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(dict(settings))
    scheme = _group_of(module, [group for group in config.config_groups.values() if group.weights])
    compressor = BaseCompressor.get_value_from_registry(scheme.format or infer_module_format(torch.nn.Linear, scheme))
    if "weight_packed" in parts and "weight_shape" in parts:
        _check_packing(parts["weight_packed"], parts["weight_shape"], scheme.weights.num_bits)
    # The library computes in the scale's precision: in float32, nothing is rounded a second time.
    scale = parts["weight_scale"]
    state = parts | ({"weight_scale": scale.float()} if scale.dtype in (torch.bfloat16, torch.float16) else {})
    weight: Tensor = compressor.decompress(state, scheme)["weight"]
    _check_scales(parts, scheme.weights, *weight.shape)
    return weight.to(torch.float32)


def _group_of(module: str, groups: Sequence[Any]) -> Any:
    """The group of compressed-tensors that a module belongs to: the only one, or else the one that names it most closely."""
    from compressed_tensors.utils.match import match_targets

    if len(groups) == 1:
        return groups[0]
    targets = {target: group for group in groups for target in group.targets}
    expressions = [target for target in targets if target.startswith("re:")]
    if len(expressions) > _MOST_EXPRESSIONS or any(is_costly(target, module) for target in expressions):
        raise HeadgramError(f"the expressions in config_groups, of which one may name {module:.200}, are costly to search for")
    found = match_targets(module, torch.nn.Linear(1, 1, device="meta"), targets)
    if not found:
        raise HeadgramError(f"the weight of {module:.200} is quantised, and no group in config_groups names it")
    return targets[found[0]]


def _check_packing(packed: Tensor, shape: Tensor, bits: int) -> None:
    """Refuse integers that were packed in other numbers of bits: the library would take the first of them for the weight."""
    columns = int(shape[-1])
    if packed.shape[-1] != math.ceil(columns * bits / 32):
        raise ValueError(f"{columns} columns in {packed.shape[-1]} words are not of {bits} bits, as the configuration says")


def _check_scales(parts: Parts, stated: Any, rows: int, columns: int) -> None:
    """Refuse other scales than are stated: the library would repeat them, or do without."""
    group, (high, wide) = stated.group_size or columns, stated.block_structure or (rows, columns)
    in_groups = (rows, math.ceil(columns / group))
    shapes = {
        "channel": (rows, 1), "group": in_groups, "tensor_group": in_groups,
        "block": (math.ceil(rows / high), math.ceil(columns / wide)),
    }  # fmt: skip
    found, strategy = tuple(parts["weight_scale"].shape), str(getattr(stated.strategy, "value", stated.strategy))
    if strategy in shapes and found != shapes[strategy]:
        raise ValueError(f"scales {found} of a weight {(rows, columns)} by {strategy}")
    if strategy == "tensor_group" and "weight_global_scale" not in parts:
        raise ValueError("weight_global_scale is missing")


def _nf4_shape(stored: Stored, settings: Config) -> tuple[int, ...]:
    state = next(part for part in stored.shapes if "quant_state" in part)
    return tuple(int(size) for size in json.loads(bytes(bytes_of(stored.read(state))))["shape"])


def _decode_4bit(parts: Parts, settings: Config, module: str) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tables = {part.removeprefix("weight."): tensor for part, tensor in parts.items() if part != "weight"}
    state = QuantState.from_dict(tables, torch.device("cpu"))
    packed = parts["weight"].reshape(-1).view(torch.uint8)
    if not state.nested and not state.absmax.is_floating_point():
        raise ValueError("weight.nested_absmax is missing")
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


def _8bit_shape(stored: Stored, settings: Config) -> tuple[int, ...]:
    if "weight_format" in stored.shapes and bool(stored.read("weight_format").count_nonzero()):
        raise HeadgramError(
            "headgram reads 8-bit weights of bitsandbytes in rows only, and weight_format says that these are in tiles of a GPU: "
            "save the model again with bitsandbytes 0.45 or newer"
        )
    return stored.shapes["weight"]


def _decode_8bit(parts: Parts, settings: Config, module: str) -> Tensor:
    if tuple(parts["SCB"].shape) not in ((len(parts["weight"]),), (len(parts["weight"]), 1)):
        raise ValueError(f"{tuple(parts['SCB'].shape)} scales of {len(parts['weight'])} rows")
    return parts["weight"].to(torch.float32) * parts["SCB"].to(torch.float32).reshape(-1, 1) / 127


_HQQ_PARTS = ("scale", "zero", "shape", "packing")
_GPTQ_PARTS = ("qzeros", "scales", "g_idx")
_4BIT_PARTS = ("weight", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
#: What modelopt calls the ways of quantising that leave weights as numbers with scales.
_MODELOPT = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "MXFP8",
    "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8",
    "W4A16_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "MIXED_PRECISION",
)  # fmt: skip
#: By `quant_method`.
SCHEMES = {
    "fp8": (_scaled("weight_scale_inv"), _scaled("weight_scale")),
    "fbgemm_fp8": (_scaled("weight_scale"),),
    "modelopt": (_scaled("weight_scale", packed=("fp4", "int4")),),
    "mxfp4": (_scaled("weight_scales", "weight_blocks", packed=("fp4",)),),
    "quark": (_scaled("weight_scale", packed=("fp4",)),),
    "torchao": (_scaled("_weight_scale", "_weight_qdata"),),
    "compressed-tensors": (
        Scheme(
            "weight_scale",
            ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
            _compressed_shape,
            _decode_compressed,
        ),
    ),
    "awq": (Scheme("qweight", ("qzeros", "scales"), _awq_shape, _decode_awq, needs=("qzeros", "scales")),),
    "gptq": (Scheme("qweight", _GPTQ_PARTS, _gptq_shape, _decode_gptq, needs=("qzeros", "scales")),),
    "hqq": (Scheme("W_q", _HQQ_PARTS, _hqq_shape, _decode_hqq, needs=_HQQ_PARTS),),
    "bitsandbytes": (
        Scheme(
            "weight.absmax",
            (*_4BIT_PARTS, "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
            _nf4_shape,
            _decode_4bit,
        ),
        Scheme("SCB", ("weight",), _8bit_shape, _decode_8bit, beside=("weight_format",)),
    ),
}
