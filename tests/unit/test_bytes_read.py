"""Extraction reads what a circuit is made of, and nothing else: also of tensors that hold several roles."""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.local_file import LocalFile, Span
from headgram.families import layouts
from headgram.forms.circuits import CIRCUITS
from headgram.results.record import Provenance, Recipe
from headgram.stages.extract import extract

DIMS = layouts.Dimensions(
    heads=8,
    kv_heads=8,
    rank=5,
    hidden=11,
    value_rank=5,
    output_width=13,
    sizes={"nope": 3, "rope": 2, "key_latent": 6, "query_latent": 7},
)
GROUPED = layouts.Dimensions(heads=8, kv_heads=2, rank=4, hidden=11, value_rank=4, output_width=11, sizes=DIMS.sizes)
WIDTH = 256
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": WIDTH}
NEOX = {"model_type": "gpt_neox", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH}


@pytest.mark.parametrize("dims", [DIMS, GROUPED], ids=["all heads have a key", "grouped"])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_some_roles_need_no_more_than_their_rows(layout: str, dims: layouts.Dimensions) -> None:
    """They are the same as out of the whole tensors, and all roles together read every number once, but what two of them need."""
    if dims.kv_heads < dims.heads and layout in ("quarters", "latent", "latent_direct"):
        return  # these have no groups
    for part in layouts.LAYOUTS[layout]:
        whole = {tensor: torch.randn(shape) for tensor, shape in part.shapes(dims).items()}
        expected = part.split(dims, **whole)
        for count in range(1, len(part.gives) + 1):
            for roles in itertools.combinations(part.gives, count):
                cuts = part.cuts(dims, roles)
                read = {tensor: cuts[tensor].of(stored) if tensor in cuts else stored for tensor, stored in whole.items()}
                found = part.factors(dims, roles, read)
                assert all(torch.equal(found[role], expected[role]) for role in roles)
                if part.reads in (("fused",), ("query",)):
                    assert read[part.reads[0]].numel() == sum(expected[role].numel() for role in roles)


def neox_tensors() -> dict[str, torch.Tensor]:
    block = "gpt_neox.layers.{}.attention.{}.weight"
    shapes = {
        block.format(i, name): (rows, WIDTH)
        for i in range(2)
        for name, rows in (("query_key_value", 3 * WIDTH), ("dense", WIDTH))
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def gpt2_tensors() -> dict[str, torch.Tensor]:
    shapes = {
        f"h.{i}.attn.{name}.weight": (WIDTH, columns)
        for i in range(2)
        for name, columns in (("c_attn", 3 * WIDTH), ("c_proj", WIDTH))
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def written(folder: Path, config: dict, tensors: dict[str, torch.Tensor], format: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if format == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif format == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        writer = gguf.GGUFWriter(folder / "m.gguf", "gpt2")
        for name, number in (("block_count", 2), ("embedding_length", WIDTH), ("feed_forward_length", 4 * WIDTH)):
            writer.add_uint32(f"gpt2.{name}", number)
        writer.add_head_count(4)
        for name, tensor in tensors.items():
            layer, module = re.match(r"h\.(\d)\.attn\.(\w+)", name).groups()
            renamed = f"blk.{layer}.{'attn_qkv' if module == 'c_attn' else 'attn_output'}.weight"
            writer.add_tensor(
                renamed,
                gguf.quants.quantize(tensor.t().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0),
                raw_dtype=gguf.GGMLQuantizationType.Q8_0,
            )
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        writer.close()
        (folder / "config.json").unlink()
        return folder / "m.gguf"
    return folder


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes of weight files each reading takes."""
    sizes: list[int] = []
    read = LocalFile.read

    def counted(file: LocalFile, spans: Iterable[Span]) -> bytearray:
        found = read(file, spans)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(LocalFile, "read", counted)
    return sizes


@pytest.mark.parametrize(
    ("config", "make", "format"),
    [
        (GPT2, gpt2_tensors, "safetensors"),
        (NEOX, neox_tensors, "safetensors"),
        (NEOX, neox_tensors, "bin"),
        (GPT2, gpt2_tensors, "gguf"),
    ],
)
def test_the_jobs_of_both_circuits_read_each_byte_once(tmp_path: Path, taken: list[int], config: dict, make, format: str) -> None:
    source = written(tmp_path / "m", config, make(), format)
    with open_checkpoint(source) as checkpoint:
        stack = checkpoint.stacks[0]
        wanted = stack.nbytes(stack.roles)
        assert wanted == sum(stack.nbytes([role]) for role in stack.roles)
        whole = {layer: checkpoint.factors("self", layer) for layer in stack.layers}
        digests = {
            name: [checkpoint.digest("self", layer, circuit.roles) for layer in stack.layers]
            for name, circuit in CIRCUITS.items()
        }
    read = 0
    for name, circuit in CIRCUITS.items():
        taken.clear()
        open_checkpoint(source)
        headers = sum(taken)
        taken.clear()
        provenance = Provenance(Recipe("extract", "{}", "f", "c"), "m", "self", name)
        extract(tmp_path / f"{name}.pt", {"source": source}, stack.layers, digests[name], "stored", provenance)
        read += sum(taken) - headers
        found = torch.load(tmp_path / f"{name}.pt")
        for role in circuit.roles:
            assert torch.equal(found[role], torch.stack([whole[layer][role] for layer in stack.layers]))
    assert read == wanted


def test_a_lock_of_whole_tensors_still_holds(tmp_path: Path) -> None:
    """As locks pinned them before single rows of a tensor were read."""
    folder = written(tmp_path / "m", NEOX, neox_tensors(), "safetensors")
    with open_checkpoint(folder) as checkpoint:
        for circuit in CIRCUITS.values():
            names = [name for name, _ in checkpoint._unique(checkpoint.stacks[0], 1, circuit.roles)]
            earlier = checkpoint._content_digest([(name, None) for name in names])
            assert checkpoint.holds("self", 1, earlier, circuit.roles)
            assert earlier != checkpoint.digest("self", 1, circuit.roles) or circuit.name == "qk"
        assert not checkpoint.holds("self", 0, earlier, circuit.roles)
