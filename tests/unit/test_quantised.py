"""Quantised checkpoints: what the libraries that made the formats write, and what they say it means."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import bitsandbytes
import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from checkpoint_files import config_bytes, llama_tensors
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headgram.checkpoints.checkpoint import open_checkpoint
from headgram.errors import HeadgramError

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
Q, K, V, OUT = (f"model.layers.{{}}.self_attn.{kind}_proj" for kind in "qkvo")


def is_attention(name: str) -> bool:
    return "_proj.weight" in name and "self_attn" in name


def quantised(quantise, **sizes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint whose attention weights went through `quantise(weight) -> (parts, decoded)`, and what they mean."""
    tensors, meaning = {}, {}
    for name, tensor in llama_tensors(**(SIZES | sizes)).items():
        if is_attention(name):
            parts, meaning[name] = quantise(tensor.float())
            tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    return tensors, meaning


def write(folder: Path, tensors: dict[str, Tensor], settings: dict, **changes) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes(config_bytes(quantization_config=settings, **(SIZES | changes)))
    return folder


def assert_means(folder: Path, meaning: dict[str, Tensor], rtol: float = 0.0, word: str | None = None) -> None:
    with open_checkpoint(folder) as checkpoint:
        stack = checkpoint.stacks[0]
        assert word is None or stack.dtype == word
        for layer in stack.layers:
            for found, key in zip(checkpoint.qk("self", layer), (Q, K), strict=True):
                expected = meaning[key.format(layer) + ".weight"]
                assert found.dtype == torch.float32
                torch.testing.assert_close(found.flatten(0, 1), expected.float(), rtol=rtol, atol=0.0)


def fp8_blocks(weight: Tensor, block: int = 128) -> tuple[dict[str, Tensor], Tensor]:
    """As DeepSeek stores it, and as compressed-tensors decodes it; block edges may be ragged."""
    rows, columns = (math.ceil(size / block) for size in weight.shape)
    scale = torch.rand(rows, columns) + 0.5
    parts = {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scale}
    library = FP8BlockDequantizer(targets=["re:.*"], weight_block_size=(block, block), dtype=torch.float32)
    return parts, library.process({"m." + name: value for name, value in parts.items()})["m.weight"]


@pytest.mark.parametrize("hidden", [256, 320])
def test_fp8_blocks(tmp_path, hidden):
    tensors, meaning = quantised(fp8_blocks, hidden_size=hidden)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert_means(write(tmp_path, tensors, settings, hidden_size=hidden), meaning, word="fp8")


COMPRESSED = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True}),
    "int4 groups with zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int3 channels": ("pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": True}),
    "int8 channels": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    "fp8 channels": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
    "fp8 blocks": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(tmp_path, kind):
    format_name, arguments = COMPRESSED[kind]
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format_name)
    library = BaseCompressor.get_value_from_registry(format_name)

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        shaped = {
            "group": weight.reshape(rows, -1, args.group_size or 1),
            "channel": weight.unsqueeze(1),
            "tensor": weight.reshape(1, 1, -1),
            "block": weight.reshape(rows // 128, 128, columns // 128, 128).transpose(1, 2).flatten(2)
            if rows % 128 == 0
            else weight,
        }[args.strategy]
        scale, zero = calculate_qparams(shaped.amin(-1), shaped.amax(-1), args)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        parts = library.compress(state, scheme)
        if arguments.get("symmetric", True):
            parts.pop("weight_zero_point", None)
        exact = parts | {"weight_scale": parts["weight_scale"].float()}
        return parts, library.decompress(exact, scheme)["weight"]

    tensors, meaning = quantised(quantise)
    settings = QuantizationConfig(config_groups={"group_0": scheme}, format=format_name).model_dump(mode="json")
    assert settings["quant_method"] == "compressed-tensors"
    assert_means(write(tmp_path, tensors, settings), meaning, word="compressed-tensors")
    for weight, original in ((meaning[name], tensor) for name, tensor in llama_tensors(**SIZES).items() if name in meaning):
        assert (weight - original.float()).norm() < 0.35 * original.float().norm()


@pytest.mark.parametrize(("kind", "group"), [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)])
def test_compressed_tensors_in_4bit_floats(tmp_path, kind, group):
    strategy = "tensor_group" if group == 16 else "group"
    args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)
    library = BaseCompressor.get_value_from_registry(kind)

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grouped = weight.unflatten(1, (-1, group))
        if group == 16:
            whole = generate_gparam(weight.amin(), weight.amax())
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=whole)
            state = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
        else:
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            state = {"weight": weight, "weight_scale": 2.0 ** scale.log2().ceil()}
        parts = library.compress(state, scheme)
        decoded = library.decompress(parts, scheme)["weight"].float()
        assert (decoded - weight).norm() < 0.2 * weight.norm()
        return parts, decoded

    tensors, meaning = quantised(quantise)
    settings = QuantizationConfig(config_groups={"group_0": scheme}, format=kind).model_dump(mode="json")
    assert_means(write(tmp_path, tensors, settings), meaning)


def test_compressed_tensors_as_a_model_is_saved(tmp_path):
    """A Llama that the library compressed and transformers saved, against what the library makes of the saved model."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=64, vocab_size=16, **sizes))
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="frozen", format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.data.unflatten(1, (-1, 32))
            module.weight_scale.data.copy_(calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)[0])
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    compressor.decompress_model(model)
    assert_means(tmp_path, {name: tensor for name, tensor in model.state_dict().items() if is_attention(name)})


def packed(*targets: str, bits: int) -> tuple[QuantizationScheme, dict[str, Tensor], dict[str, Tensor]]:
    """A scheme of integers with a scale for each row, a checkpoint whose attention is packed by it, and what that means."""
    args = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=list(targets), weights=args, format="pack-quantized")
    library = BaseCompressor.get_value_from_registry("pack-quantized")

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
        parts = library.compress({"weight": weight, "weight_scale": scale}, scheme)
        return parts, library.decompress(parts, scheme)["weight"]

    return scheme, *quantised(quantise)


def by_groups(*schemes: QuantizationScheme) -> dict:
    groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes)}
    return QuantizationConfig(config_groups=groups, format="pack-quantized").model_dump(mode="json")


@pytest.mark.parametrize("wide", ["Linear", "re:.*_proj"])
@pytest.mark.parametrize("first", [True, False])
def test_of_several_groups_the_one_that_names_a_module_most_closely_counts(tmp_path, wide, first):
    """As in the library, whichever group stands first."""
    names = [part.format(layer) for layer in range(2) for part in (Q, K, V, OUT)]
    own, tensors, meaning = packed(*(names if wide != "Linear" else ["re:.*self_attn.*"]), bits=8)
    other, _, _ = packed(wide, bits=4)
    assert_means(write(tmp_path, tensors, by_groups(*((own, other) if first else (other, own)))), meaning)


@pytest.mark.parametrize("expression", ["re:(.*)*x", f"re:{'.*' * 9}x", f"re:{'.*' * 99}", f"re:{'a?' * 30}", "re:.*nobody"])
def test_expressions_that_take_for_ever_or_name_nothing_are_refused(tmp_path, expression):
    """Also of several groups; one alone is taken without a search."""
    own, tensors, meaning = packed(expression, bits=8)
    other, _, _ = packed("re:.*nobody", bits=4)
    assert_means(write(tmp_path, tensors, by_groups(own)), meaning)
    words = "no group in config_groups names it" if expression == "re:.*nobody" else "costly to search for"
    with (
        open_checkpoint(write(tmp_path, tensors, by_groups(own, other))) as checkpoint,
        pytest.raises(HeadgramError, match=words),
    ):
        checkpoint.qk("self", 0)


def test_integers_of_other_bits_than_the_configuration_says_are_refused(tmp_path):
    _, tensors, _ = packed("Linear", bits=8)
    wrong, _, _ = packed("Linear", bits=4)
    with open_checkpoint(write(tmp_path, tensors, by_groups(wrong))) as checkpoint, pytest.raises(HeadgramError, match="4 bits"):
        checkpoint.qk("self", 0)


def pack(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers along the columns into 32 bits, lowest first."""
    lanes = values.to(torch.int64).unflatten(1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return (lanes.sum(-1) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def awq(weight: Tensor, group: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """AutoAWQ's format, decoded by compressed-tensors' converter and decompressor."""
    outputs, inputs = weight.shape
    order = torch.arange(outputs).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    parts = {
        "qweight": pack(torch.randint(16, (inputs, outputs))[:, order], 4),
        "qzeros": pack(torch.randint(16, (inputs // group, outputs))[:, order], 4),
        "scales": (torch.rand(inputs // group, outputs) + 0.5).half(),
    }
    converter = AutoAWQConverter(group_size=group)
    state = {name.removeprefix("m."): value for name, value in converter.process({f"m.{k}": v for k, v in parts.items()}).items()}
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=group, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state["weight_scale"] = state["weight_scale"].float()
    return parts, BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]


def test_awq(tmp_path):
    tensors, meaning = quantised(awq)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    assert_means(write(tmp_path, tensors, settings), meaning, word="awq")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("version", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq(tmp_path, bits, version, offset, ordered):
    """The format's definition: the weight is scale · (integer − zero) of the input's group."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        outputs, inputs = weight.shape
        groups = torch.arange(inputs) // 64 if ordered else torch.randperm(inputs) // 64
        values, zeros = torch.randint(2**bits, (inputs, outputs)), torch.randint(1, 2**bits, (inputs // 64, outputs))
        scales = (torch.rand(inputs // 64, outputs) + 0.5).half()
        parts = {"qweight": pack(values.T, bits).T, "qzeros": pack(zeros - offset, bits), "scales": scales}
        meaning = torch.stack([scales[g].float() * (value - zeros[g]) for g, value in zip(groups, values, strict=True)], 1)
        return parts | ({} if ordered else {"g_idx": groups.int()}), meaning

    tensors, meaning = quantised(quantise)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 64, "checkpoint_format": version, "desc_act": not ordered}
    assert_means(write(tmp_path, tensors, settings), meaning, word="gptq")


@pytest.mark.parametrize(("hidden", "group"), [(192, 128), (320, 128), (192, -1), (192, None)])
@pytest.mark.parametrize("named", [True, False])
def test_gptq_groups_of_the_stated_size(tmp_path, hidden, group, named):
    """The last group may be smaller: 192 inputs in groups of 128 are 128 and 64, not 96 and 96."""
    size = {-1: hidden, None: 64}.get(group, group)

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        outputs, inputs = weight.shape
        groups = torch.arange(inputs) // size
        count = math.ceil(inputs / size)
        values, zeros = torch.randint(16, (inputs, outputs)), torch.randint(1, 16, (count, outputs))
        scales = torch.rand(count, outputs) + 0.5
        parts = {"qweight": pack(values.T, 4).T, "qzeros": pack(zeros - 1, 4), "scales": scales}
        return parts | ({"g_idx": groups.int()} if named else {}), (scales[groups] * (values - zeros[groups])).T

    tensors, meaning = quantised(quantise, hidden_size=hidden)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False}
    assert_means(write(tmp_path, tensors, settings, hidden_size=hidden), meaning, word="gptq")


HQQ = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}


def hqq(packing: str, axis: int = 1, group: int | None = 64, as_floats: bool = False):
    """HQQ's `Quantizer.quantize` and `BitPack`, and `encode_safetensor_type`: groups in rows (axis 1) or columns (axis 0)."""
    bits, share = HQQ[packing]

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        shape = weight.shape if group is None else (-1, group) if axis == 1 else (group, -1)
        values = torch.randint(2**bits, weight.reshape(shape).shape, dtype=torch.int32)
        per_group = (len(values), 1) if axis == 1 else (1, values.shape[1])
        scale, zero = (torch.rand(per_group) + 0.5).half(), (torch.rand(per_group) * 2**bits).half()
        padded = torch.cat([values, torch.zeros(-len(values) % share, values.shape[1], dtype=torch.int32)])
        words = sum(part << bits * (share - 1 - place) for place, part in enumerate(padded.chunk(share)))
        words = words if share == 10 else words.to(torch.uint8)
        parts = {"W_q": words.view(torch.float16) if as_floats else words, "scale": scale, "zero": zero}
        parts |= {"shape": torch.tensor(weight.shape), "packing": torch.tensor(list(packing.encode()), dtype=torch.uint8)}
        parts |= {"nbits": torch.tensor(bits, dtype=torch.int32), "axis": torch.tensor(axis, dtype=torch.int32)}
        return parts, ((values.float() - zero.float()) * scale.float()).reshape(weight.shape)

    return quantise


@pytest.mark.parametrize("packing", HQQ)
@pytest.mark.parametrize("more", [{}, {"axis": 0}, {"group": None}, {"as_floats": True}], ids=str)
def test_hqq(tmp_path, packing, more):
    tensors, meaning = quantised(hqq(packing, **more))
    settings = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": HQQ[packing][0], "group_size": 64}}}
    assert_means(write(tmp_path, tensors, settings), meaning, rtol=1e-6, word="hqq")


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("zero", None, "its part zero is missing"),
        ("packing", torch.tensor(list(b"4bit_33"), dtype=torch.uint8), "packed as '4bit_33'"),
        ("scale", torch.ones(7, 1), "do not fit together"),
        ("scale", torch.ones(1, 1), "do not fit together"),
        ("zero", torch.ones(1), "do not fit together"),
        ("scale", torch.ones(5, 1, 1), "do not fit together"),
        ("shape", torch.tensor([256, 999]), "shape|do not fit together"),
        ("shape", torch.tensor([2**40, 2**40]), "claims shape"),
        ("W_q", torch.zeros(3, 64, dtype=torch.uint8), "claims shape|do not fit together"),
    ],
)
def test_parts_of_hqq_that_do_not_fit(tmp_path, part, value, sentence):
    tensors, _ = quantised(hqq("4bit_u8"))
    tensors |= {f"{Q.format(0)}.{part}": value}
    folder = write(tmp_path, {key: tensor for key, tensor in tensors.items() if tensor is not None}, {"quant_method": "hqq"})
    with pytest.raises(HeadgramError, match=sentence), open_checkpoint(folder) as checkpoint:
        checkpoint.qk("self", 0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_4bit(tmp_path, kind, nested):
    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, state = quantize_4bit(weight.bfloat16(), blocksize=64, compress_statistics=nested, quant_type=kind)
        parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        state.dtype = torch.float32
        return parts | {"weight": packed}, dequantize_4bit(packed, state)

    tensors, meaning = quantised(quantise)
    assert any("quant_state.bitsandbytes__" + kind in name for name in tensors)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    assert_means(write(tmp_path, tensors, settings), meaning, word="bitsandbytes")


def test_bitsandbytes_module(tmp_path):
    """What the library's own layer saves."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
        layer.load_state_dict({"weight": weight})
        layer = layer.to("cpu")
        state = layer.state_dict()
        return state, dequantize_4bit(layer.weight.data, QuantState.from_dict(
            {name.removeprefix("weight."): value for name, value in state.items() if name != "weight"}, "cpu"
        ))  # fmt: skip

    tensors, meaning = quantised(quantise)
    assert_means(write(tmp_path, tensors, {"quant_method": "bitsandbytes"}), meaning, rtol=1e-6)


def test_bitsandbytes_8bit(tmp_path):
    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        integers, scales, _ = int8_vectorwise_quant(weight.half())
        return {"weight": integers, "SCB": scales}, int8_vectorwise_dequant(integers, scales)

    tensors, meaning = quantised(quantise)
    assert_means(write(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}), meaning, rtol=1e-6)


@pytest.mark.parametrize("order", [0, 2])
def test_8bit_weights_in_tiles_of_a_gpu_are_refused(tmp_path, order):
    """What bitsandbytes before 0.45 saved after a run on a GPU; 0 says that they are in rows."""
    integers, scales, _ = int8_vectorwise_quant(torch.randn(256, 256).half())
    parts = {"weight": integers, "SCB": scales, "weight_format": torch.tensor(order, dtype=torch.uint8)}
    tensors = llama_tensors(**SIZES) | {f"{Q.format(1)}.{part}": tensor for part, tensor in parts.items()}
    folder = write(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    if order:
        with pytest.raises(HeadgramError, match="in tiles of a GPU"):
            open_checkpoint(folder)
    else:
        with open_checkpoint(folder) as checkpoint:
            expected = int8_vectorwise_dequant(integers, scales)
            torch.testing.assert_close(checkpoint.qk("self", 1)[0].flatten(0, 1), expected, rtol=1e-6, atol=0.0)


def test_weights_that_a_method_left_plain_are_read_as_they_are(tmp_path):
    tensors = llama_tensors(**SIZES)
    for method in ("mxfp4", "awq", "compressed-tensors"):
        with open_checkpoint(write(tmp_path, tensors, {"quant_method": method})) as checkpoint:
            assert checkpoint.stacks[0].dtype == "BF16"
            assert torch.equal(checkpoint.qk("self", 1)[0].flatten(0, 1), tensors[Q.format(1) + ".weight"])


def test_every_part_counts(tmp_path):
    """Size and digest of a layer cover scales as well as integers."""
    tensors, _ = quantised(awq)
    settings = {"quant_method": "awq", "bits": 4}
    parts = [name for name in tensors if name.startswith((Q.format(0), K.format(0)))]
    with open_checkpoint(write(tmp_path, tensors, settings)) as checkpoint:
        first = checkpoint.digest("self", 0)
        assert checkpoint.stacks[0].qk_bytes == 2 * sum(tensors[name].nbytes for name in parts)
    for part in ("qweight", "qzeros", "scales"):
        changed = tensors | {f"{K.format(0)}.{part}": tensors[f"{K.format(0)}.{part}"].flip(0)}
        with open_checkpoint(write(tmp_path, changed, settings)) as checkpoint:
            assert checkpoint.digest("self", 0) != first


def test_an_unknown_method_is_named(tmp_path):
    with pytest.raises(HeadgramError, match="quantised by 'spqr'"):
        open_checkpoint(write(tmp_path, llama_tensors(**SIZES), {"quant_method": "spqr"}))


def test_integers_without_a_method_are_refused(tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in llama_tensors(**SIZES).items()}
    with pytest.raises(HeadgramError, match="stored as F8_E4M3"):
        open_checkpoint(write(tmp_path, tensors, {}))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    packed, state = quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    tensors = llama_tensors(hidden_size=64) | {
        Q.format(0) + ".weight": packed,
        **{f"{Q.format(0)}.weight.{name}": value for name, value in state.as_dict(packed=True).items()},
    }
    folder = write(tmp_path, tensors, {"quant_method": "bitsandbytes"}, hidden_size=64)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with open_checkpoint(folder) as checkpoint, pytest.raises(HeadgramError, match=r"pip install headgram\[quantised\]"):
        checkpoint.qk("self", 0)


@pytest.mark.parametrize(
    ("settings", "damage", "sentence"),
    [
        ({"quant_method": "awq", "bits": 3}, {}, "bits = 3"),
        ({"quant_method": "awq", "version": "gemv"}, {}, "version = 'gemv'"),
        ({"quant_method": "awq"}, {"scales": torch.ones(3, 7)}, "do not fit together"),
        ({"quant_method": "awq"}, {"qweight": torch.ones(3, dtype=torch.int32)}, "do not fit together"),
        ({"quant_method": "awq", "format": "gemv"}, {}, "format = 'gemv'"),
        ({"quant_method": "awq", "version": "gemm", "checkpoint_format": "marlin"}, {}, "checkpoint_format = 'marlin'"),
        ({"quant_method": "awq", "backend": "llm-awq"}, {}, "backend = 'llm-awq'"),
        ({"quant_method": "awq", "group_size": 128}, {}, "do not fit together"),
        ({"quant_method": "awq", "q_group_size": 0}, {}, "do not fit together"),
        ({"quant_method": "gptq", "bits": 3}, {}, "bits = 3"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, settings, damage, sentence):
    tensors, _ = quantised(awq)
    tensors |= {f"{Q.format(0)}.{part}": value for part, value in damage.items()}
    write(tmp_path, tensors, settings)
    with pytest.raises(HeadgramError, match=sentence), open_checkpoint(tmp_path) as checkpoint:
        checkpoint.qk("self", 0)


@pytest.mark.parametrize(
    ("settings", "damage", "sentence"),
    [
        ({"checkpoint_format": "marlin"}, {}, "checkpoint_format = 'marlin'"),
        ({"format": "bitblas"}, {}, "format = 'bitblas'"),
        ({"format": 2}, {}, "format = 2"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, {}, "states both gptq and gptq_v2"),
        ({"is_marlin_format": True}, {}, "is_marlin_format = True"),
        ({"group_size": 128}, {}, "do not fit together"),
        ({"group_size": -1}, {}, "do not fit together"),
        ({"group_size": "64"}, {}, "do not fit together"),
        ({}, {"g_idx": torch.full((256,), 99, dtype=torch.int32)}, "do not fit together"),
        ({}, {"g_idx": torch.full((256,), -1, dtype=torch.int32)}, "do not fit together"),
        ({}, {"g_idx": torch.zeros(256)}, "do not fit together"),
    ],
)
def test_gptq_in_another_format_or_in_other_groups_than_stated(tmp_path, settings, damage, sentence):
    test_gptq(tmp_path, 4, "gptq", 1, True)
    tensors = load_file(tmp_path / "model.safetensors") | {f"{Q.format(0)}.{part}": value for part, value in damage.items()}
    write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 64} | settings)
    with pytest.raises(HeadgramError, match=sentence), open_checkpoint(tmp_path) as checkpoint:
        checkpoint.qk("self", 0)


def test_the_second_format_of_gptq_by_its_other_name(tmp_path):
    test_gptq(tmp_path, 4, "gptq_v2", 0, True)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config["quantization_config"]
    with open_checkpoint(tmp_path) as checkpoint:
        expected = checkpoint.qk("self", 0)[0]
    settings["format"] = settings.pop("checkpoint_format")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.qk("self", 0)[0], expected)


@pytest.mark.parametrize("part", ["qweight", "W_q", "weight_packed", "weight.absmax"])
def test_a_quantised_weight_that_no_configuration_explains_is_named(tmp_path, part):
    tensors = {f"{name.removesuffix('weight')}{part}" if is_attention(name) else name: t for name, t in llama_tensors().items()}
    write(tmp_path, tensors, {})
    with pytest.raises(HeadgramError, match=rf"q_proj\.{part} instead.* `quantization_config`"):
        open_checkpoint(tmp_path)


#: A check that writes a checkpoint and reads it, a part of one weight, and what becomes of that part; gone, if None.
INCOMPLETE = {
    "a scale of a channel": (lambda folder: test_compressed_tensors(folder, "int8 channels"), "weight_scale", lambda p: p[:1]),
    "scales in one axis": (lambda folder: test_compressed_tensors(folder, "int8 channels"), "weight_scale", Tensor.flatten),
    "scales of groups": (lambda folder: test_compressed_tensors(folder, "int4 groups"), "weight_scale", lambda part: part[:1]),
    "scales of blocks": (lambda folder: test_compressed_tensors(folder, "fp8 blocks"), "weight_scale", lambda part: part[:1]),
    "zero points": (
        lambda folder: test_compressed_tensors(folder, "int4 groups with zeros"), "weight_zero_point", lambda part: None,
    ),
    "a scale of scales": (
        lambda folder: test_compressed_tensors_in_4bit_floats(folder, "nvfp4-pack-quantized", 16), "weight_global_scale",
        lambda part: None,
    ),
    "scales of scales": (lambda folder: test_bitsandbytes_4bit(folder, "nf4", True), "weight.nested_absmax", lambda part: None),
    "scales of rows": (test_bitsandbytes_8bit, "SCB", lambda part: part[:1]),
    "an order of inputs": (lambda folder: test_gptq(folder, 4, "gptq", 1, False), "g_idx", lambda part: None),
    "an order of other inputs": (lambda folder: test_gptq(folder, 4, "gptq", 1, False), "g_idx", lambda part: part[:1]),
    "zeros of other groups": (lambda folder: test_gptq(folder, 4, "gptq", 1, True), "qzeros", lambda part: part.repeat(2, 1)),
    "scales of one output": (lambda folder: test_gptq(folder, 4, "gptq", 1, True), "scales", lambda part: part[:, :1]),
    "scales of other groups": (test_awq, "scales", lambda part: part[:2]),
}  # fmt: skip


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_what_a_library_would_repeat_or_do_without_is_refused(tmp_path, kind):
    """A missing part, or one that fits by being repeated, gave wrong weights."""
    check, part, change = INCOMPLETE[kind]
    check(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), f"{Q.format(0)}.{part}"
    changed = {name: value} if (value := change(tensors.pop(name))) is not None else {}
    save_file(tensors | {key: value.contiguous() for key, value in changed.items()}, tmp_path / "model.safetensors")
    with pytest.raises(HeadgramError, match=r"missing|do not fit"), open_checkpoint(tmp_path) as checkpoint:
        checkpoint.qk("self", 0)


def test_short_4bit_tables_are_refused(tmp_path):
    packed, state = quantize_4bit(torch.randn(64, 64), quant_type="nf4", blocksize=64)
    parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()} | {"weight": packed}
    for part, value in (("weight.absmax", torch.ones(2)), ("weight.quant_map", torch.ones(3)), ("weight", packed[:5])):
        damaged = {f"{Q.format(0)}.{name}": tensor for name, tensor in (parts | {part: value.contiguous()}).items()}
        write(tmp_path, llama_tensors(hidden_size=64) | damaged, {"quant_method": "bitsandbytes"}, hidden_size=64)
        with pytest.raises(HeadgramError, match=r"table is too short|more than the"), open_checkpoint(tmp_path) as checkpoint:
            checkpoint.qk("self", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"format": "dense", "quantization_status": "frozen"}])
def test_weights_that_lie_unrounded_beside_their_scales_are_refused(tmp_path, dtype, more):
    """As llm-compressor saves them with `save_compressed=False`: they would be multiplied by the scales."""
    test_compressed_tensors(tmp_path, "fp8 blocks")
    tensors = load_file(tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    plain = {name: tensor.to(dtype) if is_attention(name) else tensor for name, tensor in tensors.items()}
    write(tmp_path, plain, settings | more)
    with pytest.raises(HeadgramError, match="beside their scales"):
        open_checkpoint(tmp_path)


def test_rotated_and_reordered_weights_are_refused(tmp_path):
    tensors = llama_tensors(**SIZES) | {f"{Q.format(0)}.weight_scale": torch.ones(1)}
    for extra, settings in (
        ({f"{Q.format(0)}.weight_g_idx": torch.ones(1)}, {}),
        ({}, {"transform_config": {"config_groups": {}}}),
    ):
        write(tmp_path, tensors | extra, {"quant_method": "compressed-tensors", **settings})
        with pytest.raises(HeadgramError, match="rotated"):
            open_checkpoint(tmp_path)


def test_a_claimed_shape_is_bounded_by_what_is_stored(tmp_path):
    tensors = llama_tensors(**SIZES)
    tensors.pop(Q.format(0) + ".weight")
    tensors |= {
        f"{Q.format(0)}.weight_packed": pack_to_int32(torch.zeros(8, 8, dtype=torch.int8), 4),
        f"{Q.format(0)}.weight_scale": torch.ones(8, 1),
        f"{Q.format(0)}.weight_shape": torch.tensor([10**6, 10**6]),
    }
    with pytest.raises(HeadgramError, match="more than the"):
        open_checkpoint(write(tmp_path, tensors, {"quant_method": "compressed-tensors"}))


def random_gguf(shape: tuple[int, int], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Weights in a GGUF type: the library's own quantisation, or random blocks where it only decodes."""
    try:
        return gguf.quants.quantize(np.random.default_rng(0).standard_normal(shape, np.float32), kind)
    except NotImplementedError:
        bytes_per_row = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        return np.random.default_rng(0).integers(0, 0x3C, bytes_per_row, dtype=np.uint8)  # finite whichever bytes are scales


def gguf_types() -> list[str]:
    """All types that the library decodes."""
    readable = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.dequantize(random_gguf((1, 256), kind), kind)
        except (NotImplementedError, KeyError, ValueError):
            continue
        readable.append(kind.name)
    return readable


@pytest.mark.parametrize("kind", gguf_types())
def test_gguf(tmp_path, kind):
    """The rows that llama.cpp's converter permuted come back in order."""
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in (
        ("block_count", 2),
        ("embedding_length", 256),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ):
        writer.add_uint32(f"llama.{key}", value)
    straight = {}
    for layer in range(2):
        for role, heads in (("q", 4), ("k", 2)):
            stored = random_gguf((heads * 64, 256), quantisation)
            rows = np.arange(heads * 64).reshape(heads, 2, 32).swapaxes(1, 2).reshape(-1)  # what the converter does to rows
            writer.add_tensor(f"blk.{layer}.attn_{role}.weight", np.ascontiguousarray(stored[rows]), raw_dtype=quantisation)
            straight[layer, role] = torch.from_numpy(gguf.quants.dequantize(stored, quantisation)).float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        assert checkpoint.stacks[0].dtype == kind
        for layer in range(2):
            for found, role in zip(checkpoint.qk("self", layer), "qk", strict=True):
                assert torch.equal(found.flatten(0, 1).float(), straight[layer, role])


def test_gguf_covers_the_common_types():
    common = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 MXFP4"
    assert set(common.split()) <= set(gguf_types())


def test_torch_files(tmp_path):
    tensors = llama_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(config_bytes())
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with open_checkpoint(source) as checkpoint:
            assert (checkpoint.location.format, checkpoint.stacks[0].dtype) == ("bin", "BF16")
            assert torch.equal(checkpoint.qk("self", 1)[1].flatten(0, 1), tensors[K.format(1) + ".weight"])
            torch_digest = checkpoint.digest("self", 0)
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.digest("self", 0) == torch_digest


def test_sharded_torch_files_with_shared_storage(tmp_path):
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors[Q.format(0) + ".weight"] = tensors[Q.format(0) + ".weight"].T.contiguous().T
    homes = {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(tensors)}
    for home in set(homes.values()):
        torch.save({name: tensors[name] for name in tensors if homes[name] == home}, tmp_path / home)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    (tmp_path / "config.json").write_bytes(config_bytes())
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.qk("self", 0)[0].flatten(0, 1), tensors[Q.format(0) + ".weight"])
