"""Llama as Meta and Mistral publish it, against transformers' conversion and scores under the original rotary encoding."""

from __future__ import annotations

import json

import pytest
import torch
from hostile_files import assert_refused, pickled, write
from safetensors.torch import save

from headgram.checkpoints.known import open_checkpoint
from headgram.study.manifest import Row
from headgram.study.resolve import resolve

PARAMS = {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "norm_eps": 1e-5, "vocab_size": -1}
HEADS, KV_HEADS, RANK, WIDTH = 4, 2, 16, 48


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"tok_embeddings.weight": (32, WIDTH), "norm.weight": (WIDTH,), "output.weight": (32, WIDTH), "rope.freqs": (8,)}
    for layer in range(2):
        base = f"layers.{layer}"
        shapes |= {
            f"{base}.attention.wq.weight": (HEADS * RANK, WIDTH),
            f"{base}.attention.wk.weight": (KV_HEADS * RANK, WIDTH),
            f"{base}.attention.wv.weight": (KV_HEADS * RANK, WIDTH),
            f"{base}.attention.wo.weight": (WIDTH, HEADS * RANK),
            f"{base}.attention_norm.weight": (WIDTH,),
            f"{base}.feed_forward.w1.weight": (64, WIDTH),
        }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`permute` of transformers' `convert_llama_weights_to_hf.py`."""
    return weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def assert_read(source, original=None) -> None:
    original = original or tensors()
    with open_checkpoint(source) as checkpoint:
        stack = checkpoint.stacks[0]
        assert (checkpoint.architecture, stack.heads, stack.kv_heads, stack.rank, stack.hidden) == ("llama", 4, 2, 16, 48)
        for layer in stack.layers:
            found = checkpoint.factors("self", layer)
            base = f"layers.{layer}.attention"
            assert torch.equal(found["query"].flatten(0, 1), permuted(original[f"{base}.wq.weight"], HEADS))
            assert torch.equal(found["key"].flatten(0, 1), permuted(original[f"{base}.wk.weight"], KV_HEADS))
            assert torch.equal(found["value"].flatten(0, 1), original[f"{base}.wv.weight"])
            assert torch.equal(found["output"].flatten(0, 1).T, original[f"{base}.wo.weight"])


def in_slices(count: int) -> dict[str, bytes]:
    """As parallel training saves it: norms whole in every file."""
    axes = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "output": 0, "tok_embeddings": 1}
    files: dict[str, dict] = {f"consolidated.{i:02}.pth": {} for i in range(count)}
    for name, tensor in tensors().items():
        axis = axes.get(name.split(".")[-2])
        pieces = [tensor] * count if axis is None else tensor.chunk(count, axis)
        for file, piece in zip(files.values(), pieces, strict=True):
            file[name] = piece.clone()
    return {name: pickled(file) for name, file in files.items()} | {"params.json": json.dumps(PARAMS).encode()}


@pytest.mark.parametrize("count", [1, 2])
def test_slices(tmp_path, count):
    write(tmp_path, in_slices(count))
    assert_read(tmp_path)
    entry = resolve(Row(1, "m", str(tmp_path), None, {}))
    assert [file.name for file in entry.files] == [f"consolidated.{i:02}.pth" for i in range(count)] + ["params.json"]


def test_one_safetensors_file_as_mistral_publishes_it(tmp_path):
    write(tmp_path, {"consolidated.safetensors": save(tensors()), "params.json": json.dumps(PARAMS).encode()})
    assert_read(tmp_path)


def test_the_layout_of_transformers_comes_first(tmp_path):
    write(tmp_path, in_slices(2))
    other = {name.replace("layers.", "model.layers."): tensor for name, tensor in tensors().items() if "attention.w" not in name}
    for layer in range(2):
        for new, old, heads in (("q_proj", "wq", HEADS), ("k_proj", "wk", KV_HEADS)):
            weight = tensors()[f"layers.{layer}.attention.{old}.weight"]
            other[f"model.layers.{layer}.self_attn.{new}.weight"] = -permuted(weight, heads)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 48,
    }
    write(tmp_path, {"model.safetensors": save(other), "config.json": json.dumps(config).encode()})
    assert torch.equal(open_checkpoint(tmp_path).qk("self", 0)[0], -torch.stack(heads_of(0, "wq", HEADS)))


def heads_of(layer: int, name: str, count: int) -> list[torch.Tensor]:
    return list(permuted(tensors()[f"layers.{layer}.attention.{name}.weight"], count).unflatten(0, (count, RANK)))


def test_rows_meet_the_rotary_encoding_of_transformers(tmp_path):
    """Scores of Meta's code (`apply_rotary_emb`, neighbouring rows as complex numbers) and of half-split rotation agree."""
    write(tmp_path, in_slices(1))
    with open_checkpoint(tmp_path) as checkpoint:
        w_q, w_k = checkpoint.qk("self", 0)
    x, y = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    angles = torch.arange(RANK // 2).double() * 0.3
    turn = torch.polar(torch.ones_like(angles), angles)
    wq, wk = (tensors()[f"layers.0.attention.{name}.weight"].double() for name in ("wq", "wk"))

    def complex_rows(weight, vector):
        return torch.view_as_complex((weight @ vector).view(-1, RANK // 2, 2))

    def rotated(rows):
        low, high = rows.chunk(2, -1)
        return rows * angles.cos().repeat(2) + torch.cat([-high, low], -1) * angles.sin().repeat(2)

    meta = (complex_rows(wq, x) * turn * complex_rows(wk, y).conj().repeat_interleave(2, 0)).real.sum(-1)
    ours = (rotated(w_q.double() @ x) * (w_k.double() @ y).repeat_interleave(2, 0)).sum(-1)
    torch.testing.assert_close(meta, ours)


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("described", ["params.json", "config.json"])
def test_the_last_slices_are_missing(tmp_path, stated, described):
    """What is left of two slices is a llama of narrower heads, unless `head_dim` follows from `dim` and `n_heads`."""
    params = PARAMS | {"dim": HEADS * RANK}
    whole = {f"layers.{i}.attention.{name}.weight": torch.ones(64, 64) for i in range(2) for name in ("wq", "wk", "wv", "wo")}
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64,
        "head_dim": RANK,
    } if described == "config.json" else params | {"n_kv_heads": 4}  # fmt: skip
    if not stated:
        del config["head_dim"]
    write(tmp_path, {"consolidated.00.pth": pickled(whole), described: json.dumps(config).encode()})
    assert open_checkpoint(tmp_path).stacks[0].rank == RANK
    cut = {name: weight[:, :32] if "wo" in name else weight[:32] for name, weight in whole.items()}
    write(tmp_path, {"consolidated.00.pth": pickled({name: weight.clone() for name, weight in cut.items()})})
    assert_refused(tmp_path, r"wq\.weight .*has 32 rows, .*fetch all files")


def test_what_is_incomplete_is_refused(tmp_path):
    files = in_slices(3 - 1)
    write(tmp_path, files)
    assert_refused(tmp_path / "consolidated.01.pth", "name the folder that it is in")
    (tmp_path / "consolidated.00.pth").unlink()
    assert_refused(tmp_path, r"lacks the file 'consolidated\.00\.pth'")
    write(tmp_path, files)
    write(tmp_path, {"params.json": json.dumps({**PARAMS, "n_heads": "four"}).encode()})
    assert_refused(tmp_path, "states `n_heads`")
    write(tmp_path, {"params.json": json.dumps({**PARAMS, "n_kv_heads": 3}).encode()})
    assert_refused(tmp_path, "disagree|cannot share")
    (tmp_path / "params.json").unlink()
    assert_refused(tmp_path, r"no params\.json")
    write(tmp_path, {"params.json": json.dumps(PARAMS).encode(), "consolidated.01.pth": pickled({"a": torch.ones(1)})})
    assert_refused(tmp_path, "lacks tensor|fit together")
