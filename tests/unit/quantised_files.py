"""Checkpoints of quantised weights, and what their parts mean."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoint_files import config_bytes, llama_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from headgram.checkpoints.known import open_checkpoint

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
