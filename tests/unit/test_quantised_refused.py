"""Quantised weights that cannot be read are refused in one sentence."""

from __future__ import annotations

import sys

import pytest
import test_compressed_tensors as compressed
import test_quantised as methods
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from checkpoint_files import llama_tensors
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from quantised_files import SIZES, Q, awq, hqq, is_attention, quantised, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError


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
    methods.test_gptq(tmp_path, 4, "gptq", 1, True)
    tensors = load_file(tmp_path / "model.safetensors") | {f"{Q.format(0)}.{part}": value for part, value in damage.items()}
    write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 64} | settings)
    with pytest.raises(HeadgramError, match=sentence), open_checkpoint(tmp_path) as checkpoint:
        checkpoint.qk("self", 0)


@pytest.mark.parametrize("part", ["qweight", "W_q", "weight_packed", "weight.absmax"])
def test_a_quantised_weight_that_no_configuration_explains_is_named(tmp_path, part):
    tensors = {f"{name.removesuffix('weight')}{part}" if is_attention(name) else name: t for name, t in llama_tensors().items()}
    write(tmp_path, tensors, {})
    with pytest.raises(HeadgramError, match=rf"q_proj\.{part} instead.* `quantization_config`"):
        open_checkpoint(tmp_path)


#: A check that writes a checkpoint and reads it, a part of one weight, and what becomes of that part; gone, if None.
INCOMPLETE = {
    "a scale of a channel": (
        lambda folder: compressed.test_compressed_tensors(folder, "int8 channels"),
        "weight_scale",
        lambda p: p[:1],
    ),
    "scales in one axis": (
        lambda folder: compressed.test_compressed_tensors(folder, "int8 channels"),
        "weight_scale",
        Tensor.flatten,
    ),
    "scales of groups": (
        lambda folder: compressed.test_compressed_tensors(folder, "int4 groups"),
        "weight_scale",
        lambda part: part[:1],
    ),
    "scales of blocks": (
        lambda folder: compressed.test_compressed_tensors(folder, "fp8 blocks"),
        "weight_scale",
        lambda part: part[:1],
    ),
    "zero points": (
        lambda folder: compressed.test_compressed_tensors(folder, "int4 groups with zeros"),
        "weight_zero_point",
        lambda part: None,
    ),
    "a scale of scales": (
        lambda folder: compressed.test_compressed_tensors_in_4bit_floats(folder, "nvfp4-pack-quantized", 16),
        "weight_global_scale",
        lambda part: None,
    ),
    "scales of scales": (
        lambda folder: methods.test_bitsandbytes_4bit(folder, "nf4", True),
        "weight.nested_absmax",
        lambda part: None,
    ),
    "scales of rows": (methods.test_bitsandbytes_8bit, "SCB", lambda part: part[:1]),
    "an order of inputs": (lambda folder: methods.test_gptq(folder, 4, "gptq", 1, False), "g_idx", lambda part: None),
    "an order of other inputs": (lambda folder: methods.test_gptq(folder, 4, "gptq", 1, False), "g_idx", lambda part: part[:1]),
    "zeros of other groups": (
        lambda folder: methods.test_gptq(folder, 4, "gptq", 1, True),
        "qzeros",
        lambda part: part.repeat(2, 1),
    ),
    "scales of one output": (lambda folder: methods.test_gptq(folder, 4, "gptq", 1, True), "scales", lambda part: part[:, :1]),
    "scales of other groups": (methods.test_awq, "scales", lambda part: part[:2]),
}


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
