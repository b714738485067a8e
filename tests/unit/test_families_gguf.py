"""The registry's GGUF rules, against transformers' own reading of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType

from headgram import HeadgramError
from headgram.checkpoints.known import open_checkpoint
from headgram.families.around import AROUND
from headgram.proofs.prove import quiet

#: Architectures with biases of queries and keys.
BIASED = ("qwen2", "qwen2moe", "gpt2")
HEADS, LAYERS, VOCABULARY = 4, 2, 32064  # phi3 pads with token 32000


def written(path: Path, architecture: str, kv_heads: int, rank: int, fused: bool, around: bool = False) -> Path:
    """A GGUF file with random weights of attention, and of the norms and biases `around` it, in llama.cpp's naming."""
    random = np.random.default_rng(0)
    width = HEADS * rank
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(4 * width)
    writer.add_context_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(rank)
    writer.add_value_length(rank)
    writer.add_rope_dimension_count(rank)
    writer.add_vocab_size(VOCABULARY)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_sliding_window(16)
    rows = (
        {"attn_qkv": (HEADS + 2 * kv_heads) * rank}
        if fused
        else {"attn_q": HEADS * rank, "attn_k": kv_heads * rank, "attn_v": kv_heads * rank}
    )
    for layer in range(LAYERS):
        for name, count in rows.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.standard_normal((count, width)).astype(np.float32))
        writer.add_tensor(f"blk.{layer}.attn_output.weight", random.standard_normal((width, HEADS * rank)).astype(np.float32))
        norms = {"attn_norm": width, **(dict.fromkeys(("attn_q_norm", "attn_k_norm"), rank) if "qwen3" in architecture else {})}
        norms |= {"post_attention_norm": width} if architecture == "gemma2" else {}
        for name, count in norms.items() if around else ():
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.standard_normal(count).astype(np.float32))
        biases = dict.fromkeys(("attn_norm",), width) | rows if architecture == "gpt2" else rows
        for name, count in biases.items() if around and architecture in BIASED else ():
            writer.add_tensor(f"blk.{layer}.{name}.bias", random.standard_normal(count).astype(np.float32))
    if around:
        writer.add_tensor("output_norm.weight", random.standard_normal(width).astype(np.float32))
        writer.add_rope_freq_base(500.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "rank", "fused"),
    [
        ("llama", 2, 12, False),
        ("qwen2", 2, 12, False),
        ("qwen2moe", 2, 12, False),
        ("qwen3", 2, 128, False),  # transformers does not read its rank from the file
        ("qwen3moe", 2, 12, False),
        ("gemma2", 2, 12, False),
        ("gemma3", 2, 12, False),
        ("gpt-oss", 2, 64, False),
        ("nemotron", 2, 12, False),
        ("starcoder2", 2, 12, False),
        ("stablelm", 2, 12, False),
        ("phi3", 2, 12, True),
        ("gpt2", 4, 12, True),
        ("bloom", 4, 12, True),
    ],
)
def test_gguf_weights_are_those_that_transformers_reads(
    tmp_path: Path, architecture: str, kv_heads: int, rank: int, fused: bool
) -> None:
    from transformers import AutoModelForCausalLM

    path = written(tmp_path / "tiny.gguf", architecture, kv_heads, rank, fused)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
        model.hf_quantizer = None  # it dequantised the file, and would now refuse to save anything
        model.save_pretrained(tmp_path / "saved")
    with open_checkpoint(path) as ours, open_checkpoint(tmp_path / "saved") as theirs:
        assert ours.stack("self").layers == theirs.stack("self").layers
        for layer in range(LAYERS):
            mine, other = ours.factors("self", layer), theirs.factors("self", layer)
            assert list(mine) == list(other) == ["query", "key", "value", "output"]
            for role, factor in mine.items():
                assert torch.equal(factor, other[role]), role


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "rank", "fused"),
    [
        ("llama", 2, 12, False),
        ("qwen2", 2, 12, False),
        ("qwen2moe", 2, 12, False),
        ("qwen3", 2, 128, False),
        ("qwen3moe", 2, 12, False),
        ("gemma2", 2, 12, False),
        ("gpt2", 4, 12, True),
    ],
)
def test_what_stands_around_heads_is_what_transformers_reads(
    tmp_path: Path, architecture: str, kv_heads: int, rank: int, fused: bool
) -> None:
    from transformers import AutoModelForCausalLM

    path = written(tmp_path / "tiny.gguf", architecture, kv_heads, rank, fused, around=True)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
        model.hf_quantizer = None
        model.save_pretrained(tmp_path / "saved")
    with open_checkpoint(path) as ours, open_checkpoint(tmp_path / "saved") as theirs:
        mine, other = ours.frames("self"), theirs.frames("self")
        last, expected = ours.token_tables.final_norm(), theirs.token_tables.final_norm()
    assert last is not None
    assert expected is not None
    assert last.centred == expected.centred
    torch.testing.assert_close(last.gain, expected.gain)
    assert set(mine.missing) <= {"scale", "cap"}
    for layer, frame in mine.layers.items():
        for role in AROUND:
            if role not in mine.missing:
                torch.testing.assert_close(parts(getattr(frame, role)), parts(getattr(other.layers[layer], role)), msg=role)
        assert frame.norm is not None
        assert frame.norm.gain is not None
        assert (frame.query_bias is not None) == (architecture in BIASED)
        assert (frame.query_norm is not None) == architecture.startswith("qwen3")
        assert (frame.output_norm is not None) == (architecture == "gemma2")


def parts(value: Any) -> list[Any]:
    """What a norm, a rotary encoding, a bias or a number consists of."""
    values = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else [value]
    return [each for each in values if each is not None]


@pytest.mark.parametrize("scaled", ["tensor", "type"])
def test_a_scaled_rotary_encoding_of_a_gguf_file_is_refused(tmp_path: Path, scaled: str) -> None:
    writer = GGUFWriter(path := tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    if scaled == "type":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        writer.add_tensor(name, np.ones((8, 8), dtype=np.float32))
    if scaled == "tensor":
        writer.add_tensor("rope_freqs.weight", np.ones(2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = {
        "type": "'yarn, of a GGUF file', which is not known",
        "tensor": r"'the tensor rope_freqs.weight', which is not known",
    }
    with open_checkpoint(path) as checkpoint, pytest.raises(HeadgramError, match=words[scaled]):
        checkpoint.around("self", 0).rotary()
