"""Which tokens directions read and write: projections, the texts of tokens as data, and the table."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from headgram.checkpoints.checkpoint import open_checkpoint
from headgram.checkpoints.vocabulary import token_texts
from headgram.errors import HeadgramError
from headgram.geometry import projections as module
from headgram.geometry.projections import projections
from headgram.results.files import written_whole
from headgram.results.record import Identity, Provenance, seal
from headgram.results.tables import read_table
from headgram.stages.tokens import Directions, Written, find_tokens
from headgram.study.options import Config
from tiny import write_llama, write_llama_gguf

TEXTS = ["<s>", "Ġthe", "cat", "ĠcafÃ©", "Ċ", "\x1b[2J"]
READ = ["<s>", " the", "cat", " café", "\n", "\x1b[2J"]


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 50), st.integers(1, 4), st.sampled_from([1, 2**30]))
def test_projections_are_their_definition(rows, step, count, n, block):
    generator = torch.Generator().manual_seed(rows * 100 + step)
    table = torch.randn(rows, 8, generator=generator) + 3
    directions = torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", block)
        found = projections(directions, table.split(step), count)
    centred = (table - table.mean(0)).double()
    truth = directions.double() @ centred.T
    kept = min(rows, count)
    assert found.rows.shape == (n, 2, kept)
    assert found.count == rows
    for end, descending in enumerate((True, False)):
        expected = truth.sort(dim=1, descending=descending).values[:, :kept]
        torch.testing.assert_close(found.values[:, end], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(truth.gather(1, found.rows[:, end]), expected, rtol=1e-4, atol=1e-5)
    if rows > 1:
        torch.testing.assert_close(found.share, truth.square().sum(1) / centred.square().sum(), rtol=1e-3, atol=1e-6)
        spread = truth.square().mean(1).sqrt()[:, None, None]
        torch.testing.assert_close(found.deviations, found.values / spread, rtol=1e-3, atol=1e-3)


def sentencepiece(texts):
    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = (field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -1.5) + b"\x18\x01") for text in texts)
    return b"".join(pieces) + field(2, b"\x0a\x01x")


BLANKS = [text.replace(" ", "▁") for text in READ]
FILES = {
    "tokenizer.json": (
        json.dumps(
            {"model": {"vocab": dict(zip(TEXTS[1:], range(1, 6), strict=True))}, "added_tokens": [{"id": 0, "content": "<s>"}]}
        ),
        READ,
    ),
    "tokenizer.json of scores": (json.dumps({"model": {"vocab": [[text, -1.0] for text in BLANKS]}}), READ),
    "vocab.json": (json.dumps(dict(zip(TEXTS, range(6), strict=True))), READ),
    "vocab.txt": ("\n".join(["<s>", "the", "##cat"]), ["<s>", "the", "##cat"]),
    "tokenizer.model": (sentencepiece(BLANKS), READ),
}


@pytest.mark.parametrize("name", FILES)
def test_texts_are_read_from_every_format(tmp_path, name):
    content, expected = FILES[name]
    folder = write_llama(tmp_path / "llama", layers=1)
    (folder / name.split(" of ")[0]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with open_checkpoint(folder) as checkpoint:
        assert token_texts(checkpoint.location) == dict(enumerate(expected))


@pytest.mark.parametrize("times", [1, 1000])
def test_texts_are_read_from_a_gguf_file_however_long(tmp_path, times):
    write_llama_gguf(tmp_path / "model.gguf", layers=1, metadata={"tokenizer.ggml.tokens": TEXTS * times})
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        assert token_texts(checkpoint.location) == dict(enumerate(READ * times))


def test_without_a_tokenizer_there_are_no_texts(tmp_path):
    with open_checkpoint(write_llama(tmp_path / "llama", layers=1)) as checkpoint:
        assert token_texts(checkpoint.location) == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": [1]}}}'),
        ("tokenizer.json", b'{"model": {"vocab": [1]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": 5}]}'),
        ("tokenizer.json", b'{"model": {"vocab": {"\\ud800": 0}}}'),
        ("vocab.json", b'{"a": 1e9}'),
        ("vocab.txt", b"\xff"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\x0f"),
        ("tokenizer.model", b"\x0a"),
        ("tokenizer.model", b"\x0b"),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, name, content):
    folder = write_llama(tmp_path / "llama", layers=1)
    (folder / name).write_bytes(content)
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(HeadgramError, match=f"{name} is no tokenizer's file that headgram reads"),
    ):
        token_texts(checkpoint.location)


def test_a_tokenizer_that_is_a_link_out_of_the_checkpoint_is_refused(tmp_path):
    (tmp_path / "secret").write_text("a line that is nobody's business")
    folder = write_llama(tmp_path / "llama", layers=1)
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with open_checkpoint(folder) as checkpoint, pytest.raises(HeadgramError, match="'vocab.txt' leads out of"):
        token_texts(checkpoint.location)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "gguf"])
def test_slices_are_the_tensor_cut_into_rows(tmp_path, kind):
    if kind == "gguf":
        write_llama_gguf(source := tmp_path / "model.gguf", layers=1, hidden=32, quantisation=2)  # Q4_0
        name = "blk.0.attn_q.weight"
    else:
        source, name = write_llama(tmp_path / "llama", layers=1), "model.embed_tokens.weight"
        if kind == "bin":
            torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
            (source / "model.safetensors").unlink()
    with open_checkpoint(source) as checkpoint:
        whole = checkpoint._store.read(name)
        for rows in (1, 7, 1000):
            pieces = list(checkpoint._store.slices(name, rows))
            assert max(map(len, pieces)) <= rows
            torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=0)


def written(tmp_path, folder, width=32):
    """The table `tokens` of made up directions: the first of every head is a row of the embedding or of the output."""
    tensors = load_file(folder / "model.safetensors")
    merge, directions = Identity("merge", "{}", "f", "c"), torch.zeros(2, 3, 2, width)
    rows = tensors["model.embed_tokens.weight"].clone()
    rows -= rows.mean(0)
    directions[..., 0, :] = torch.nn.functional.normalize(rows[:6, :width].view(2, 3, width), dim=-1)
    by_circuit = {
        circuit: {
            stack: {"layers": torch.tensor([0, 3]), "right": directions, "left": directions} for stack in ("self", "vision")
        }
        for circuit in ("qk", "ov")
    }
    path, record = tmp_path / "directions.pt", tmp_path / "merge.json"
    with written_whole(path) as file:
        torch.save(by_circuit, file)
    seal(record, Provenance(merge, "m", None), [path])
    out = Written(tmp_path / "tokens.parquet", tmp_path / "tokens.json")
    options = Config.model_validate({"tokens": {"enabled": True, "count": 4}})
    find_tokens(
        Directions(path, record),
        out,
        {"source": str(folder)},
        options,
        Provenance(Identity("tokens", "{}", "f", "c", (merge.key,)), "m", None),
    )
    return read_table(out.table).to_pandas()


def test_the_table_names_the_tokens_of_every_direction(tmp_path):
    folder = write_llama(tmp_path / "llama", layers=4)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].roll(1, 0)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(FILES["tokenizer.json"][0])
    table = written(tmp_path, folder)
    # Directions of zeros have no tokens, and stacks of pictures none at all.
    assert len(table) == 4 * 2 * 3 * 1 * 2 * 4
    assert set(table["stack"]) == {"self"}
    first = table.query("place == 0 and sign == 1").set_index(["circuit", "side", "layer", "head"])["token"].sort_index()
    for circuit, side in (("qk", "right"), ("qk", "left"), ("ov", "right"), ("ov", "left")):
        expected = [(i + (side == "left" and circuit == "ov")) % 32 for i in range(6)]
        assert first[circuit, side].tolist() == expected
    texts = dict(enumerate(READ))
    assert table["text"].tolist() == [texts.get(token, "") for token in table["token"]]
    assert (table.query("sign == 1")["value"] > 0).all()
    assert (table.query("sign == -1")["value"] < 0).all()
    assert table["share"].between(0, 1).all()


def test_a_model_without_embeddings_has_an_empty_table(tmp_path, capsys):
    folder = write_llama(tmp_path / "llama", layers=4)
    table = written(tmp_path, folder, width=16)
    assert table.empty
    said = capsys.readouterr().out
    assert "qk, self, right: without tokens: the rows of model.embed_tokens.weight have width 32, and its stream 16" in said
    assert "qk, vision, left: without tokens: its stream holds no tokens as the model embeds them" in said
    assert np.dtype(table["value"].dtype) == np.float32
