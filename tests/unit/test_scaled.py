"""Small floats and integers with scales, as each producer stores them; what they mean is its definition, spelt out here."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoint_files import llama_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from quantised_files import K, Q, assert_means, is_attention, quantised, write
from torch import Tensor

from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError
from headgram.study.manifest import Row
from headgram.study.resolve import resolve

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def eight_bits(scale_shape, name: str = "weight_scale", dtype=E4M3, scale_dtype=torch.float32, weight_name: str = "weight"):
    """8-bit floats (or integers) times a scale, of which every entry belongs to an equal block of the weight."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        shape = scale_shape(rows, columns)
        scale = (
            (torch.rand(shape) + 0.5).to(scale_dtype) if scale_dtype != E8M0 else torch.exp2(torch.randint(-3, 3, shape)).to(E8M0)
        )
        stored = (weight * 20).to(dtype) if dtype == torch.int8 else weight.to(dtype)
        grid = scale.float().reshape(shape if len(shape) == 2 else (-1, 1) if len(shape) < 4 else shape[::2])
        whole = grid.repeat_interleave(math.ceil(rows / len(grid)), 0)[:rows]
        whole = whole.repeat_interleave(math.ceil(columns / grid.shape[1]), 1)[:, :columns]
        return {weight_name: stored, name: scale}, stored.float() * whole

    return quantise


def four_bit_floats(group: int, exponents: bool, column: bool = False):
    """As compressed-tensors decodes them: two to a byte, a scale for a group; and a scale of scales where scales are floats."""
    kind = "mxfp4-pack-quantized" if exponents else "nvfp4-pack-quantized"
    strategy = "group" if exponents else "tensor_group"
    args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed = torch.randint(256, (weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8)
        shape = (weight.shape[0], weight.shape[1] // group)
        if exponents:
            scale = torch.randint(120, 134, shape, dtype=torch.uint8)
            state = {"weight_packed": packed, "weight_scale": scale}
            stored = {"weight": packed, "weight_scale": scale.reshape(-1, 1) if column else scale}
        else:
            scale, second = (torch.rand(shape) * 8 + 1).to(E4M3), torch.tensor(2.0**-5)  # the library rounds to bfloat16
            state = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": 1 / second}
            stored = {"weight": packed, "weight_scale": scale, "weight_scale_2": second}
        library = BaseCompressor.get_value_from_registry(kind)
        return stored, library.decompress(state, scheme)["weight"].float()

    return quantise


def in_groups(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """gpt-oss's experts: groups in an axis of their own."""
    parts, meaning = four_bit_floats(32, exponents=True)(weight)
    return {"weight_blocks": parts["weight"].unflatten(1, (-1, 16)), "weight_scales": parts["weight_scale"]}, meaning


def four_bit_integers(group: int = 64):
    """modelopt's `pack_int4_in_uint8`: rows 2j and 2j + 1 in the low and the high half of byte j."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values = torch.randint(-8, 8, weight.shape, dtype=torch.int8)
        packed = ((values[::2] & 0x0F) | (values[1::2] << 4)).view(torch.uint8)
        scale = torch.rand(weight.shape[0], weight.shape[1] // group) + 0.5
        return {"weight": packed, "weight_scale": scale}, values.float() * scale.repeat_interleave(group, 1)

    return quantise


def whole(rows: int, columns: int) -> tuple[int, ...]:
    return ()


def one(rows: int, columns: int) -> tuple[int, ...]:
    return (1,)


def of_rows(rows: int, columns: int) -> tuple[int, ...]:
    return (rows,)


def column(rows: int, columns: int) -> tuple[int, ...]:
    return (rows, 1)


def of_blocks(rows: int, columns: int) -> tuple[int, ...]:
    return (math.ceil(rows / 128), math.ceil(columns / 128))


def four_axes(rows: int, columns: int) -> tuple[int, ...]:
    return (math.ceil(rows / 128), 1, math.ceil(columns / 128), 1)


def groups(rows: int, columns: int) -> tuple[int, ...]:
    return (rows, columns // 32)


INVERSE = "weight_scale_inv"
FP8 = {"quant_method": "fp8"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}


def modelopt(algorithm: str) -> dict:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "producer": {"name": "modelopt"}}


KINDS = {
    "a tensor, vLLM": (STATIC, eight_bits(whole)),
    "a tensor, transformers": (STATIC, eight_bits(whole, INVERSE)),
    "a tensor in one number": (STATIC, eight_bits(one, INVERSE, scale_dtype=torch.bfloat16)),
    "another 8-bit float": (STATIC, eight_bits(whole, dtype=E5M2)),
    "rows": ({"quant_method": "fbgemm_fp8"}, eight_bits(column)),
    "rows in one axis": (FP8, eight_bits(of_rows)),
    "blocks": (FP8, eight_bits(of_blocks, INVERSE)),
    "blocks of powers of two": (FP8 | {"scale_fmt": "ue8m0"}, eight_bits(of_blocks, INVERSE, scale_dtype=E8M0)),
    "modelopt, a tensor": (modelopt("FP8"), eight_bits(whole)),
    "modelopt, rows": (modelopt("FP8_PER_CHANNEL_PER_TOKEN"), eight_bits(of_rows)),
    "modelopt, blocks of four axes": (modelopt("FP8_PB_WO"), eight_bits(four_axes)),
    "modelopt, groups": (modelopt("MXFP8"), eight_bits(groups, scale_dtype=E8M0)),
    "modelopt, integers": (modelopt("W8A16"), eight_bits(of_rows, dtype=torch.int8)),
    "modelopt, NVFP4": (modelopt("NVFP4"), four_bit_floats(16, exponents=False)),
    "modelopt, NVFP4 in short": ({"quant_method": "modelopt_fp4"}, four_bit_floats(16, exponents=False)),
    "modelopt, MXFP4": (modelopt("MXFP4"), four_bit_floats(32, exponents=True)),
    "modelopt, MXFP4 in a column": (modelopt("W4A8_MXFP4_FP8"), four_bit_floats(32, exponents=True, column=True)),
    "modelopt, 4-bit integers": (modelopt("W4A16_AWQ"), four_bit_integers()),
    "MXFP4 as in gpt-oss": ({"quant_method": "mxfp4"}, in_groups),
    "Quark, a tensor": ({"quant_method": "quark"}, eight_bits(whole)),
    "Quark, rows": ({"quant_method": "quark"}, eight_bits(of_rows)),
    "Quark, MXFP4": ({"quant_method": "quark"}, four_bit_floats(32, exponents=True)),
    "torchao, a tensor": (TORCHAO, eight_bits(lambda r, c: (1, 1), "_weight_scale", weight_name="_weight_qdata")),
    "torchao, rows": (TORCHAO, eight_bits(column, "_weight_scale", weight_name="_weight_qdata")),
    "torchao, integers in groups": (TORCHAO, eight_bits(groups, "_weight_scale", torch.int8, weight_name="_weight_qdata")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_means(tmp_path, kind):
    settings, quantise = KINDS[kind]
    tensors, meaning = quantised(quantise)
    word = str(settings["quant_method"]).removesuffix("_fp4")
    assert_means(write(tmp_path, tensors, settings), meaning, rtol=1e-6, word=word)


@pytest.mark.parametrize("rows", [True, False])
def test_square_blocks_may_be_ragged(tmp_path, rows):
    tensors, meaning = quantised(eight_bits(of_blocks, INVERSE), hidden_size=256 if rows else 320)
    for name in [name for name in tensors if name.endswith(INVERSE)]:
        tensors[name] = torch.ones_like(tensors[name]) * 0.5
        plain = name.removesuffix("_scale_inv")
        meaning[plain] = tensors[plain].float() * 0.5
    assert_means(write(tmp_path, tensors, FP8, hidden_size=256 if rows else 320), meaning)


@pytest.mark.parametrize(
    ("kind", "part", "algorithm"),
    [
        ("modelopt, NVFP4", "pre_quant_scale", {"quant_algo": "NVFP4_AWQ"}),
        ("torchao, rows", "_weight_act_pre_scale", {}),
        ("torchao, integers in groups", "_weight_act_pre_scale", {}),
    ],
)
def test_inputs_that_are_scaled_first(tmp_path, kind, part, algorithm):
    """modelopt's `pre_quant_scale`, torchao's `act_pre_scale`: inputs are multiplied by it before the weight."""
    settings, quantise = KINDS[kind]
    tensors, meaning = quantised(quantise)
    for layer in range(2):
        for key in (Q, K):
            tensors[f"{key.format(layer)}.{part}"] = torch.rand(256) + 0.5
            meaning[f"{key.format(layer)}.weight"] *= tensors[f"{key.format(layer)}.{part}"]
    assert_means(write(tmp_path, tensors, settings | algorithm), meaning, rtol=1e-6)


def test_what_modelopt_says_in_a_file_of_its_own(tmp_path):
    tensors, meaning = quantised(eight_bits(whole))
    write(tmp_path, tensors, {})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(stated))
    assert_means(tmp_path, meaning, word="modelopt")
    files = resolve(Row(1, "m", str(tmp_path), None, {})).files
    assert [file.name for file in files] == ["model.safetensors", "config.json", "hf_quant_config.json"]


def changed(kind: str, part: str, value: Tensor | None):
    """A kind with a part of one query weight changed or gone."""
    settings, quantise = KINDS[kind]
    tensors, _ = quantised(quantise)
    key = f"{Q.format(0)}.{part}"
    return settings, {name: tensor for name, tensor in (tensors | {key: value}).items() if tensor is not None}


REFUSED = {
    "no scale": (
        "a tensor, vLLM",
        "weight_scale",
        None,
        "its scale is missing: there is no .*weight_scale_inv or .*weight_scale",
    ),
    "no scale of blocks": ("blocks", INVERSE, None, "its scale is missing"),
    "no scale of groups": ("modelopt, MXFP4", "weight_scale", None, "its scale is missing"),
    "two scales": ("blocks", "weight_scale", torch.ones(()), "two kinds of scales, weight_scale_inv and weight_scale"),
    "no second scale": ("modelopt, NVFP4", "weight_scale_2", None, "lack the second scale"),
    "a second scale too many": ("modelopt, a tensor", "weight_scale_2", torch.ones(()), "have a second scale"),
    "no weight": ("torchao, rows", "_weight_qdata", None, "its part _weight_qdata is missing"),
    "a scale of three": ("a tensor, vLLM", "weight_scale", torch.ones(3), "do not fit together"),
    "a scale of columns": ("a tensor, vLLM", "weight_scale", torch.ones(1, 256), "do not fit together"),
    "scales of other blocks": ("blocks", INVERSE, torch.ones(4, 4), "do not fit together"),
    "scales of other groups": ("modelopt, NVFP4", "weight_scale", torch.ones(256, 8).to(E4M3), "do not fit together"),
    "a scale in integers": ("rows in one axis", "weight_scale", torch.ones(256, dtype=torch.int32), "do not fit together"),
    "bytes of integers elsewhere": (
        "Quark, rows",
        "weight",
        torch.ones(128, 256, dtype=torch.uint8),
        "do not fit|not read of this",
    ),
    "packed words": ("Quark, rows", "weight", torch.ones(256, 32, dtype=torch.int32), "do not fit together"),
    "zero points": ("Quark, rows", "weight_zero_point", torch.ones(256), "has zero points"),
    "half bytes of torchao": (
        "torchao, rows",
        "_weight_qdata",
        torch.ones(256, 128, dtype=torch.uint8),
        "do not fit|not read of",
    ),
    "a scale that is no number": ("modelopt, MXFP4", "weight_scale", torch.full((256, 8), 255, dtype=torch.uint8), "NaN"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind):
    origin, part, value, sentence = REFUSED[kind]
    settings, tensors = changed(origin, part, value)
    write(tmp_path, tensors, settings)
    with pytest.raises(HeadgramError, match=sentence), open_checkpoint(tmp_path) as checkpoint:
        checkpoint.qk("self", 0)


@pytest.mark.parametrize("algorithm", ["NVFP4_SVD", "W4A8_AWQ", "NEW"])
def test_algorithms_that_are_more_than_scales_are_refused(tmp_path, algorithm):
    tensors, _ = quantised(four_bit_floats(16, exponents=False))
    for settings in (modelopt(algorithm), modelopt("MIXED_PRECISION") | {"quantized_layers": {"x": {"quant_algo": algorithm}}}):
        with pytest.raises(HeadgramError, match=f"modelopt's {algorithm}"):
            open_checkpoint(write(tmp_path, tensors, settings))


def test_integers_are_never_weights(tmp_path):
    """Whatever method is declared, what it does not explain is refused."""
    tensors = {name: t.to(torch.int8) if is_attention(name) else t for name, t in llama_tensors(hidden_size=256).items()}
    for settings in (FP8, modelopt("FP8"), {"quant_method": "quark"}, TORCHAO, {"quant_method": "compressed-tensors"}, {}):
        with pytest.raises(HeadgramError, match="stored as I8"):
            open_checkpoint(write(tmp_path, tensors, settings))
