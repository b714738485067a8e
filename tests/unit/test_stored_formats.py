"""GGUF files of every type of numbers, and torch files."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import config_bytes, llama_tensors
from quantised_files import K, Q
from safetensors.torch import save_file

from headgram.checkpoints.known import open_checkpoint


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
