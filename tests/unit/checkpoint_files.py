"""Tiny Llama-like checkpoints, as files in memory."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
}


def llama_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: int) -> dict[str, Tensor]:
    """Tensors of a Llama with `CONFIG`'s dimensions, or others, and some that are neither queries nor keys."""
    config = CONFIG | changes
    hidden, heads, kv_heads = (int(config[key]) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    rank = hidden // heads
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (16, hidden), "lm_head.weight": (16, hidden)}
    for i in range(int(config["num_hidden_layers"])):
        base = f"model.layers.{i}"
        shapes |= {
            f"{base}.self_attn.q_proj.weight": (heads * rank, hidden),
            f"{base}.self_attn.k_proj.weight": (kv_heads * rank, hidden),
            f"{base}.self_attn.v_proj.weight": (kv_heads * rank, hidden),
            f"{base}.self_attn.o_proj.weight": (hidden, heads * rank),
            f"{base}.mlp.up_proj.weight": (4 * hidden, hidden),
            f"{base}.input_layernorm.weight": (hidden,),
        }
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def config_bytes(**changes: Any) -> bytes:
    """`config.json`."""
    return json.dumps(CONFIG | changes).encode()


def sharded(tensors: dict[str, Tensor], shards: int) -> dict[str, bytes]:
    """Shards and their index; layers are spread over the shards in turn."""
    homes = {name: f"model-{i * shards // len(tensors) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    files = {home: save({name: tensors[name] for name in tensors if homes[name] == home}) for home in set(homes.values())}
    return {**files, "model.safetensors.index.json": json.dumps({"weight_map": homes}).encode()}


def single(tensors: dict[str, Tensor], **changes: Any) -> dict[str, bytes]:
    """One file and its configuration."""
    return {"model.safetensors": save(tensors), "config.json": config_bytes(**changes)}


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
