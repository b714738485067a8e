"""Quantised checkpoints: what the libraries that made the formats write, and what they say it means."""

from __future__ import annotations

import json
import math

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from checkpoint_files import llama_tensors
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from quantised_files import HQQ, SIZES, K, Q, assert_means, awq, hqq, pack, quantised, write
from torch import Tensor

from headgram.checkpoints.known import open_checkpoint


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


@pytest.mark.parametrize("packing", HQQ)
@pytest.mark.parametrize("more", [{}, {"axis": 0}, {"group": None}, {"as_floats": True}], ids=str)
def test_hqq(tmp_path, packing, more):
    tensors, meaning = quantised(hqq(packing, **more))
    settings = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": HQQ[packing][0], "group_size": 64}}}
    assert_means(write(tmp_path, tensors, settings), meaning, rtol=1e-6, word="hqq")


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
