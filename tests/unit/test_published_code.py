"""Types whose checkpoints bring code of their own: held against small modules that follow the published definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headgram.checkpoints.known import open_checkpoint
from headgram.families.registry import family_of, others

LAYERS, WIDTH, TOKENS = 2, 24, 5

#: What one layer makes of a stream `(t, d)`: queries, keys and values `(H, t, r)`, before positions turn them.
Heads = tuple[Tensor, Tensor, Tensor]


def by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def shared(x: Tensor, heads: int) -> Tensor:
    """`repeat_kv`: every key head, or value, for as many query heads in a row."""
    return x.repeat_interleave(heads // len(x), 0)


class Attention(nn.Module):
    """What all of them do with queries, keys and values; how these come about is what they differ in."""

    def __init__(self, rows: dict[str, int], output: str, heads: int, rank: int, split: Callable[..., Heads]) -> None:
        super().__init__()
        for name, count in rows.items():
            self.add(name, nn.Linear(WIDTH, count, bias=False))
        self.add(output, nn.Linear(heads * rank, WIDTH, bias=False))
        self.inputs, self.output, self.heads, self.split = tuple(rows), output, heads, split

    def add(self, path: str, module: nn.Module) -> None:
        *folders, name = path.split(".")
        inner: nn.Module = self
        for folder in folders:
            if not hasattr(inner, folder):
                inner.add_module(folder, nn.Module())
            inner = inner.get_submodule(folder)
        inner.add_module(name, module)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores `(H, t, t)`, what every head gathers at equal attention `(H, t, r)`, and the layer's output."""
        q, k, v = self.split(*(self.get_submodule(name)(x) for name in self.inputs))
        k, v = shared(k, self.heads), shared(v, self.heads)
        gathered = torch.full((len(q), len(x), len(x)), 1 / len(x)).to(v) @ v
        return q @ k.transpose(1, 2), gathered, self.get_submodule(self.output)(gathered.transpose(0, 1).flatten(1))


def blocks(name: str, output: str, heads: int, kv_heads: int, rank: int) -> Attention:
    """`qkv.split([heads * rank, kv_heads * rank, kv_heads * rank], dim=-1)`."""

    def split(qkv: Tensor) -> Heads:
        q, k, v = qkv.split([heads * rank, kv_heads * rank, kv_heads * rank], -1)
        return by_head(q, heads), by_head(k, kv_heads), by_head(v, kv_heads)

    return Attention({name: (heads + 2 * kv_heads) * rank}, output, heads, rank, split)


def three(name: str, output: str, heads: int, rank: int) -> Attention:
    """`rearrange(qkv, "... (three h d) -> ... three h d", three=3)`, and Baichuan's `unflatten(-1, (3, d))`."""

    def split(qkv: Tensor) -> Heads:
        q, k, v = qkv.unflatten(-1, (3, heads, rank)).permute(1, 2, 0, 3)
        return q, k, v

    return Attention({name: 3 * heads * rank}, output, heads, rank, split)


def groups(name: str, output: str, heads: int, kv_heads: int, rank: int) -> Attention:
    """InternLM2: `rearrange(qkv, "q (h gs d) -> q h gs d", gs=2 + groups)`; the last two of a group are its key and its value."""

    def split(qkv: Tensor) -> Heads:
        parts = qkv.unflatten(-1, (kv_heads, heads // kv_heads + 2, rank))
        q = parts[:, :, :-2].flatten(1, 2)
        return q.transpose(0, 1), parts[:, :, -2].transpose(0, 1), parts[:, :, -1].transpose(0, 1)

    return Attention({name: (heads + 2 * kv_heads) * rank}, output, heads, rank, split)


def triples(name: str, output: str, heads: int, rank: int) -> Attention:
    """ChatGLM: `mixed.view(…, heads, 3 * rank)`, then `split_tensor_along_last_dim(mixed, 3)`."""

    def split(qkv: Tensor) -> Heads:
        q, k, v = qkv.unflatten(-1, (heads, 3 * rank)).chunk(3, -1)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    return Attention({name: 3 * heads * rank}, output, heads, rank, split)


def separate(output: str, heads: int, kv_heads: int, rank: int) -> Attention:
    """As llama."""
    rows = {"q_proj": heads * rank, "k_proj": kv_heads * rank, "v_proj": kv_heads * rank}
    return Attention(rows, output, heads, rank, lambda q, k, v: (by_head(q, heads), by_head(k, kv_heads), by_head(v, kv_heads)))


USUAL = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_size": WIDTH}
GLM = {"num_layers": LAYERS, "num_attention_heads": 4, "hidden_size": WIDTH}
GROUPED = {**USUAL, "num_key_value_heads": 2}
#: Of every kind: the type, its published configuration, what a layer's names begin with, and the layers.
KINDS: dict[str, tuple[str, dict[str, Any], str, Callable[[int], Attention]]] = {
    "ChatGLM3": (
        "chatglm",
        {**GLM, "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 10},
        "transformer.encoder.layers.{}.self_attention.",
        lambda _: blocks("query_key_value", "dense", 4, 2, 10),
    ),
    "ChatGLM2 without shared keys": (
        "chatglm",
        {**GLM, "multi_query_attention": False, "kv_channels": 6},
        "transformer.encoder.layers.{}.self_attention.",
        lambda _: triples("query_key_value", "dense", 4, 6),
    ),
    "ChatGLM": ("chatglm", GLM, "transformer.layers.{}.attention.", lambda _: triples("query_key_value", "dense", 4, 6)),
    "InternLM2": ("internlm2", GROUPED, "model.layers.{}.attention.", lambda _: groups("wqkv", "wo", 4, 2, 6)),
    "Baichuan": ("baichuan", USUAL, "model.layers.{}.self_attn.", lambda _: three("W_pack", "o_proj", 4, 6)),
    "Qwen": ("qwen", {**USUAL, "kv_channels": 6}, "transformer.h.{}.attn.", lambda _: three("c_attn", "c_proj", 4, 6)),
    "MiniCPM": ("minicpm", GROUPED, "model.layers.{}.self_attn.", lambda _: separate("o_proj", 4, 2, 6)),
    "InternLM": ("internlm", USUAL, "model.layers.{}.self_attn.", lambda _: separate("o_proj", 4, 4, 6)),
    "MobileLLM": ("mobilellm", {**GROUPED, "head_dim": 6}, "model.layers.{}.self_attn.", lambda _: separate("o_proj", 4, 2, 6)),
    "Yi": ("Yi", GROUPED, "model.layers.{}.self_attn.", lambda _: separate("o_proj", 4, 2, 6)),
    "DeciLM": (
        "deci",
        {**USUAL, "num_key_value_heads_per_layer": [4, 1]},
        "model.layers.{}.self_attn.",
        lambda layer: separate("o_proj", 4, (4, 1)[layer], 6),
    ),
    "OpenELM": (
        "openelm",
        {
            "num_transformer_layers": LAYERS, "model_dim": WIDTH, "head_dim": 8, "num_query_heads": [4, 6],
            "num_kv_heads": [2, 3],
        },
        "transformer.layers.{}.attn.",
        lambda layer: blocks("qkv_proj", "out_proj", (4, 6)[layer], (2, 3)[layer], 8),
    ),
    "EXAONE 3": (
        "exaone",
        {"num_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": WIDTH},
        "transformer.h.{}.attn.attention.",
        lambda _: separate("out_proj", 4, 2, 6),
    ),
    "Phi": (
        "phi-msft",
        {"n_layer": LAYERS, "n_head": 4, "n_head_kv": None, "n_embd": WIDTH},
        "transformer.h.{}.mixer.",
        lambda _: three("Wqkv", "out_proj", 4, 6),
    ),
    "Phi with shared keys": (
        "phi-msft",
        {"n_layer": LAYERS, "n_head": 4, "n_head_kv": 2, "n_embd": WIDTH},
        "transformer.h.{}.mixer.",
        lambda _: blocks("Wqkv", "out_proj", 4, 2, 6),
    ),
    "MPT with one key head": (
        "mpt",
        {"n_layers": LAYERS, "n_heads": 4, "d_model": WIDTH, "attn_config": {"attn_type": "multiquery_attention"}},
        "transformer.blocks.{}.attn.",
        lambda _: blocks("Wqkv", "out_proj", 4, 1, 6),
    ),
    "MPT with groups": (
        "mpt",
        {
            "n_layers": LAYERS, "n_heads": 4, "d_model": WIDTH,
            "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2},
        },
        "transformer.blocks.{}.attn.",
        lambda _: blocks("Wqkv", "out_proj", 4, 2, 6),
    ),
}  # fmt: skip


def saved(folder, kind: str) -> list[Attention]:
    model_type, config, place, made = KINDS[kind]
    torch.manual_seed(3)
    layers = [made(layer) for layer in range(LAYERS)]
    tensors = {place.format(i) + name: weight for i, layer in enumerate(layers) for name, weight in layer.state_dict().items()}
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, folder / "model.safetensors")
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config, **code}))
    return layers


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_writes_are_those_of_the_published_definition(tmp_path, kind):
    layers = saved(tmp_path, kind)
    x = torch.randn(TOKENS, WIDTH)
    seen = set()
    with torch.no_grad(), open_checkpoint(tmp_path) as checkpoint:
        for stack in checkpoint.stacks:
            for number in stack.layers:
                seen.add(number)
                factors = checkpoint.factors(stack.name, number)
                scores, gathered, output = layers[number](x)
                heads = len(factors["query"])
                q, k, v = (x @ shared(factors[role], heads).transpose(1, 2) for role in ("query", "key", "value"))
                torch.testing.assert_close(q @ k.transpose(1, 2), scores)
                torch.testing.assert_close(v.mean(1, keepdim=True).expand_as(gathered), gathered)
                torch.testing.assert_close((gathered @ factors["output"]).sum(0), output)
    assert seen == set(range(LAYERS))


def test_layers_of_unlike_counts_are_stacks_of_their_own(tmp_path):
    saved(tmp_path, "OpenELM")
    with open_checkpoint(tmp_path) as checkpoint:
        found = [(stack.name, stack.layers, stack.heads, stack.kv_heads) for stack in checkpoint.stacks]
    assert found == [("self_4_2", (0,), 4, 2), ("self_6_3", (1,), 6, 3)]


def test_every_type_with_code_of_its_own_is_held_against_its_definition():
    programs = {"litgpt", "megatron", "transformer_lens"}
    assert {name for family in others() for name in family.model_types} - programs == {
        model_type for model_type, *_ in KINDS.values() if family_of(model_type) in others()
    }
