"""Tiny checkpoints, made on the fly: nothing of headgram is used to write them."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def llama_tensors(layers: int, heads: int, kv_heads: int, rank: int, hidden: int, seed: int, dtype=torch.float32) -> dict:
    """Query, key and a few other tensors of a llama, by their names on disk."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": random(32, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}.self_attn"
        tensors[f"{prefix}.q_proj.weight"] = random(heads * rank, hidden)
        tensors[f"{prefix}.k_proj.weight"] = random(kv_heads * rank, hidden)
        tensors[f"{prefix}.v_proj.weight"] = random(kv_heads * rank, hidden)
    return tensors


def write_llama(
    folder: Path, layers=4, heads=4, kv_heads=2, rank=8, hidden=32, seed=0, dtype=torch.float32, shards=1, tensors=None
) -> Path:
    """A llama folder, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rank,
        "hidden_size": hidden,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = tensors or llama_tensors(layers, heads, kv_heads, rank, hidden, seed, dtype)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    home = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if home[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return folder


def write_bert(folder: Path, layers=3, heads=3, rank=6, seed=1) -> Path:
    """A bert encoder folder."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden = heads * rank
    generator = torch.Generator().manual_seed(seed)
    config = {"model_type": "bert", "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        f"encoder.layer.{i}.attention.self.{role}.weight": torch.randn(hidden, hidden, generator=generator)
        for i in range(layers)
        for role in ("query", "key", "value")
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_llama_gguf(
    path: Path, layers=2, heads=4, kv_heads=2, rank=8, hidden=32, seed=0, quantisation=None, metadata=None, swapped=False
) -> dict:
    """A llama GGUF with the rows of q and k permuted as llama.cpp's converter does; returns the unpermuted tensors.

    `metadata` are arrays; one that is called like a number takes its place.
    """
    import gguf

    tensors = llama_tensors(layers, heads, kv_heads, rank, hidden, seed)
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG if swapped else gguf.GGUFEndian.LITTLE)
    for name, values in (metadata or {}).items():
        writer.add_array(name, values)
    if "llama.block_count" not in (metadata or {}):
        writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    for i in range(layers):
        for role, n in (("q", heads), ("k", kv_heads)):
            weight = tensors[f"model.layers.{i}.self_attn.{role}_proj.weight"].numpy()
            permuted = weight.reshape(n, 2, rank // 2, hidden).swapaxes(1, 2).reshape(weight.shape)
            data = np.ascontiguousarray(permuted)
            if quantisation is not None:
                writer.add_tensor(f"blk.{i}.attn_{role}.weight", gguf.quants.quantize(data, quantisation), raw_dtype=quantisation)
            else:
                writer.add_tensor(f"blk.{i}.attn_{role}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_manifest(path: Path, models: dict[str, Path | str]) -> Path:
    """A manifest of names and sources."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("name\tsource\trevision\n" + "".join(f"{name}\t{source}\t\n" for name, source in models.items()))
    return path
