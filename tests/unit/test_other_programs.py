"""Layouts of other programs, held against the splits of their own code, which is spelt out here."""

from __future__ import annotations

import pytest
import torch
import yaml
from checkpoint_files import CONFIG
from hostile_files import assert_refused, pickled, write
from safetensors.torch import save
from torch import Tensor

from headgram.checkpoints.known import open_checkpoint
from headgram.families.registry import families, others
from headgram.study.manifest import Row
from headgram.study.resolve import resolve

HEADS, KV_HEADS, RANK, WIDTH = 4, 2, 12, 32
YAML = {"n_layer": 2, "n_head": HEADS, "n_query_groups": KV_HEADS, "n_embd": WIDTH, "head_size": RANK, "name": "pythia"}
GIVEN = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": RANK}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def litgpt(fused: Tensor) -> dict[str, Tensor]:
    """`CausalSelfAttention.forward` of litgpt: `q, k, v = qkv.split((q_size, kv_size, kv_size))`."""
    sizes = (HEADS * RANK, KV_HEADS * RANK, KV_HEADS * RANK)
    return dict(zip(("query", "key", "value"), (part.unflatten(0, (-1, RANK)) for part in fused.split(sizes)), strict=True))


def by_groups(fused: Tensor) -> dict[str, Tensor]:
    """Megatron's `get_query_key_value_tensors`, and litgpt before 0.5: `view(groups, heads of a group + 2, rank)`, split."""
    group = HEADS // KV_HEADS
    q, k, v = fused.view(KV_HEADS, group + 2, RANK, WIDTH).split((group, 1, 1), 1)
    return {"query": q.reshape(HEADS, RANK, WIDTH), "key": k.flatten(0, 1), "value": v.flatten(0, 1)}


FUSED = {
    "litgpt": ("litgpt", "transformer.h.{}.attn.qkv.weight", "transformer.h.{}.attn.proj.weight", litgpt),
    "old litgpt": ("litgpt", "transformer.h.{}.attn.attn.weight", "transformer.h.{}.attn.proj.weight", by_groups),
    "Megatron-Core": (
        "megatron", "decoder.layers.{}.self_attention.linear_qkv.weight", "decoder.layers.{}.self_attention.linear_proj.weight",
        by_groups,
    ),
    "old Megatron": (
        "megatron", "language_model.encoder.layers.{}.self_attention.query_key_value.weight",
        "language_model.encoder.layers.{}.self_attention.dense.weight", by_groups,
    ),
}  # fmt: skip


def fused_tensors(kind: str) -> dict[str, Tensor]:
    _, fused, output, _ = FUSED[kind]
    rows = (HEADS + 2 * KV_HEADS) * RANK
    return {
        name.format(layer): drawn(10 * layer + place, *shape)
        for layer in range(2)
        for place, (name, shape) in enumerate(((fused, (rows, WIDTH)), (output, (WIDTH, HEADS * RANK))))
    }


def assert_fused(source, kind: str, **options) -> None:
    program, fused, output, split = FUSED[kind]
    tensors = fused_tensors(kind)
    with open_checkpoint(source, **options) as checkpoint:
        assert checkpoint.architecture == program
        assert checkpoint.stacks[0].layers == (0, 1)
        for layer in range(2):
            found = checkpoint.factors("self", layer)
            for role, expected in split(tensors[fused.format(layer)]).items():
                assert torch.equal(found[role], expected)
            assert torch.equal(found["output"].flatten(0, 1).T, tensors[output.format(layer)])


@pytest.mark.parametrize("kind", FUSED)
def test_one_projection(tmp_path, kind):
    """Without a configuration: counts come from the manifest, width and layers from the tensors."""
    program = FUSED[kind][0]
    write(tmp_path, {"model.safetensors": save(fused_tensors(kind))})
    assert_fused(tmp_path, kind, overrides=GIVEN | {"model_type": program})


@pytest.mark.parametrize("kind", ["litgpt", "old litgpt"])
def test_litgpts_own_files(tmp_path, kind):
    """Which may lie beside the configuration of the model that they were converted from."""
    state = {"model": fused_tensors(kind)} if kind == "litgpt" else fused_tensors(kind)
    other = str(CONFIG).replace("'", '"').encode()
    write(tmp_path, {"lit_model.pth": pickled(state), "model_config.yaml": yaml.safe_dump(YAML).encode(), "config.json": other})
    assert_fused(tmp_path, kind)
    files = resolve(Row(1, "m", str(tmp_path), None, {})).files
    assert [file.name for file in files] == ["lit_model.pth", "model_config.yaml"]
    write(tmp_path, {"model_config.yaml": b"!!python/object/apply:os.system ['true']"})
    assert_refused(tmp_path, "not valid YAML")
    write(tmp_path, {"model_config.yaml": b"- 1"})
    assert_refused(tmp_path, "does not hold a table")


@pytest.mark.parametrize("shared", [True, False])
def test_a_matrix_for_each_head(tmp_path, shared):
    """TransformerLens: `q[head] = x @ W_Q[head]`, and `sum over heads of z[head] @ W_O[head]`."""
    kv_heads, sign = (KV_HEADS, "_") if shared else (HEADS, "")
    tensors = {}
    for layer in range(2):
        base = f"blocks.{layer}.attn"
        tensors |= {
            f"{base}.W_Q": drawn(layer, HEADS, WIDTH, RANK),
            f"{base}.{sign}W_K": drawn(layer + 2, kv_heads, WIDTH, RANK),
            f"{base}.{sign}W_V": drawn(layer + 4, kv_heads, WIDTH, RANK),
            f"{base}.W_O": drawn(layer + 6, HEADS, RANK, WIDTH),
        }
    torch.save(tensors, tmp_path / "model.pt")
    given = {"model_type": "transformer_lens", "heads": HEADS, "kv_heads": kv_heads}
    with open_checkpoint(tmp_path / "model.pt", overrides=given) as checkpoint:
        stack = checkpoint.stacks[0]
        assert (stack.layers, stack.rank, stack.hidden) == ((0, 1), RANK, WIDTH)
        x = drawn(9, WIDTH)
        found = checkpoint.factors("self", 1)
        for role, name in (("query", "W_Q"), ("key", f"{sign}W_K"), ("value", f"{sign}W_V")):
            torch.testing.assert_close(found[role] @ x, torch.einsum("d,hdr->hr", x, tensors[f"blocks.1.attn.{name}"]))
        assert torch.equal(found["output"], tensors["blocks.1.attn.W_O"])


def test_other_programs_are_no_types_of_transformers():
    known = {name for family in families() for name in family.model_types}
    assert not known & {name for family in others() for name in family.model_types}
