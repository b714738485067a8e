"""Tiny bases, and adapters of them as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=16, vocab_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    attention_bias=True,
)  # fmt: skip


GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=16, n_positions=8)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]


def base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA) if kind == "llama" else GPT2LMHeadModel(GPT2)
    model.to(dtype).save_pretrained(folder)
    return folder


def adapter(folder: Path, of: Path, **settings):
    """An adapter as peft saves it, with random factors; returns the wrapped model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(of)
    model = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ALL} | settings)))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "magnitude" in name else torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model


KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 1, "o_proj": 32},
    },
    "patterns, rank-stabilised DoRA": {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "use_dora": True},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    "some by a regular expression": {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
    "biases": {"bias": "all", "lora_bias": False},
    "embeddings too": {"target_modules": ["embed_tokens", "q_proj"]},
    "single tokens too": {"trainable_token_indices": [1, 2]},
    "experts by name": {"target_parameters": ["mlp.gate_proj.weight"]},
    "another beginning": {"init_lora_weights": "orthogonal"},
}


def change(folder: Path, name: str = "adapter_config.json", **values) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edited(path: Path, **edits: Tensor | None) -> None:
    tensors = load_file(path) | edits
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
