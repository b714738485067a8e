"""Two models in the space of their common tokens, against matrices of tokens by tokens held whole in float64."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment

from headgram.checkpoints.vocabulary import common_tokens
from headgram.errors import HeadgramError
from headgram.forms.circuits import CIRCUITS
from headgram.geometry import token_space as module
from headgram.geometry.costs import BLOCK_BYTES
from headgram.geometry.token_space import TokenRows, row_products
from headgram.results.factors import write_factors
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.results.tables import read_table
from headgram.stages.lineage import FactorsAndDirections
from headgram.stages.token_space import LockedSource, write_pair
from headgram.study.options import Config
from tiny import write_llama

NAMES = {"query": "q", "key": "k", "value": "v", "output": "o"}
COUNT = 60


@settings(max_examples=20)
@given(st.integers(2, 30), st.integers(1, 9), st.integers(1, 5), st.integers(1, 7), st.sampled_from([1, 2**30]), st.booleans())
def test_products_of_rows_are_their_definition(count, width_x, width_y, step, kept, same):
    generator = torch.Generator().manual_seed(count)
    tables = [torch.randn(40, width, generator=generator) + 5 for width in (width_x, width_y)]
    places = [torch.randperm(40, generator=generator)[:count] for _ in range(2)]
    rows = [TokenRows(lambda t=t: t.split(step), r, t.shape[1]) for t, r in zip(tables, places, strict=True)]
    if same:
        rows, tables, places = rows[:1] * 2, tables[:1] * 2, places[:1] * 2
    x, y = (table[place].double() for table, place in zip(tables, places, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEPT_BYTES", kept)
        found = row_products(*rows)
    torch.testing.assert_close(found, (x - x.mean(0)).T @ (y - y.mean(0)), rtol=1e-9, atol=1e-9)


class Model:
    """Random weights, a vocabulary, and the files of both that a job reads."""

    def __init__(self, name, shape, texts, seed, tied=True):
        self.name, self.texts, self.tied = name, texts, tied
        self.layers, self.heads, self.kv_heads, self.rank, self.width = shape
        generator = torch.Generator().manual_seed(seed)
        counts = {role: self.kv_heads if role in ("key", "value") else self.heads for role in NAMES}
        self.weights = {
            role: torch.randn(self.layers, count, self.rank, self.width, generator=generator) for role, count in counts.items()
        }
        self.tables = {
            table: torch.randn(len(texts) + 3, self.width, generator=generator) + 1 for table in ("embedding", "unembedding")
        }
        if tied:
            self.tables["unembedding"] = self.tables["embedding"]

    def write(self, folder):
        tensors = {"model.embed_tokens.weight": self.tables["embedding"]}
        if not self.tied:
            tensors["lm_head.weight"] = self.tables["unembedding"]
        for layer in range(self.layers):
            for role, letter in NAMES.items():
                rows = self.weights[role][layer].flatten(0, 1)
                tensors[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = rows.mT.contiguous() if letter == "o" else rows
        shape = (self.layers, self.heads, self.kv_heads, self.rank, self.width)
        source = write_llama(folder / self.name, *shape, tensors=tensors)
        vocabulary = {text: number for number, text in enumerate(self.texts)}
        (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        parts = {}
        for circuit in CIRCUITS.values():
            path = folder / f"{self.name}-{circuit.name}.pt"
            write_factors(path, range(self.layers), {role: self.weights[role] for role in circuit.roles})
            seal(record_of(path), Provenance(self.key(circuit.name), self.name, "self", circuit.name), [path])
            parts[circuit.name, "self"] = FactorsAndDirections([path], [])
        return LockedSource(self.name, {"source": source}), parts

    def key(self, circuit):
        return Recipe("extract", "{}", self.name + circuit, "c")

    def in_tokens(self, circuit, numbers):
        """(N, n, n): every head as a matrix of tokens by tokens."""
        heads = CIRCUITS[circuit].heads(*(self.weights[role].double() for role in CIRCUITS[circuit].roles))
        left, right = (
            self.tables[table][numbers].double() for table in ("unembedding" if circuit == "ov" else "embedding", "embedding")
        )
        left, right = left - left.mean(0), right - right.mean(0)
        return torch.stack([left @ heads.form(i) @ right.T for i in range(len(heads))])


def compared(folder, before, after):
    """The table `matches` of two models."""
    sources, sides = zip(*(model.write(folder) for model in (before, after)), strict=True)
    upstream = [key for model in (before, after) for key in (*(model.key(each).key for each in CIRCUITS), "eigen", "eigen")]
    provenance = Provenance(Recipe("lineage", "{}", "f", "c", tuple(upstream)), after.name, "", "")
    tables = {name: folder / f"{name}.parquet" for name in ("drift", "changes", "matches")}
    write_pair(sides, sources, tables, folder / "pair.json", Config(), provenance)
    assert [len(read_table(tables[name])) for name in ("drift", "changes")] == [0, 0]
    return read_table(tables["matches"]).to_pandas()


def texts(seed, *more):
    """The common texts in an order of their own, among others."""
    mixed = [*(f"t{i}" for i in range(COUNT)), *more]
    return [mixed[i] for i in np.random.default_rng(seed).permutation(len(mixed))]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_matches_are_those_of_matrices_of_tokens(tmp_path, monkeypatch, kv_heads, tied):
    """Two independent models of other widths, ranks, layers and heads, whose vocabularies agree in part."""
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 4 * 3 * 20 * 4)  # several blocks
    before = Model("before", (2, 3, 1, 5, 12), texts(0, "ours", "more", "of", "ours"), 1)
    after = Model("after", (3, 4, kv_heads, 3, 20), texts(1, "theirs"), 2, tied)
    found = compared(tmp_path, before, after)
    assert set(found["among"]) == {"stack"}
    pairs = torch.tensor(common_tokens(*(dict(enumerate(model.texts)) for model in (before, after))))
    assert len(pairs) == COUNT
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    for circuit in CIRCUITS:
        x = after.in_tokens(circuit, pairs[:, 1])

        def cosines(numbers, x=x, circuit=circuit):
            y = before.in_tokens(circuit, numbers)
            return torch.einsum("aij,bij->ab", x, y) / x.norm(dim=(1, 2))[:, None] / y.norm(dim=(1, 2))

        truth, chance = cosines(pairs[:, 0]).numpy(), cosines(pairs[order, 0]).abs().amax(1).numpy()
        rows, columns = linear_sum_assignment(np.abs(truth), maximize=True)
        table = found[found["circuit"] == circuit]
        assert list(table["layer"] * after.heads + table["head"]) == list(rows)
        assert list(table["other_layer"] * before.heads + table["other_head"]) == list(columns)
        np.testing.assert_allclose(table["cosine"], truth[rows, columns], atol=1e-9)
        np.testing.assert_allclose(table["chance"], chance[rows], atol=1e-9)
        others = np.abs(truth)
        others[rows, columns] = 0
        np.testing.assert_allclose(table["margin"], np.abs(truth[rows, columns]) - others.max(1)[rows], atol=1e-9)


def test_a_model_in_another_basis_of_another_width_is_found_again(tmp_path):
    """Heads in another order, tokens with other numbers, a wider stream that is turned: every head is found, with cosine 1."""
    before = Model("before", (2, 4, 4, 3, 12), texts(0), 1, tied=False)
    after = Model("after", (2, 4, 4, 3, 20), texts(1), 2, tied=False)
    turned = torch.linalg.qr(torch.randn(20, 12, generator=torch.Generator().manual_seed(3)))[0].T
    heads = torch.tensor([2, 0, 3, 1])
    after.weights = {role: (weights @ turned)[:, heads] for role, weights in before.weights.items()}
    places = [before.texts.index(text) for text in after.texts]
    after.tables = {table: torch.cat([rows[places], rows[-3:]]) @ turned for table, rows in before.tables.items()}
    found = compared(tmp_path, before, after)
    assert len(found) == 2 * 8
    assert (found["other_layer"] == found["layer"]).all()
    assert (found["other_head"] == found["head"].map(dict(enumerate(heads.tolist())))).all()
    np.testing.assert_allclose(found["cosine"], 1, atol=1e-6)
    assert found["mutual"].all()
    assert (found["chance"] < 0.5).all()


def test_texts_that_are_not_unique_match_nothing():
    assert common_tokens({0: "a", 1: "b", 2: "b", 3: ""}, {5: "b", 6: "a", 7: ""}) == [(0, 6)]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "model after: no tokenizer that headgram reads lies beside"),
        (
            lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {"t0": 0, "other": 1}}}'),
            "models before and after have 1 tokens of the same text",
        ),
        (lambda folder: without(folder, "model.embed_tokens.weight"), "model after: this checkpoint has no embedding to read"),
    ],
)
def test_what_has_no_tokens_is_named(tmp_path, monkeypatch, spoil, words):
    models = [Model(name, (1, 2, 1, 2, 8), texts(0), seed) for seed, name in enumerate(("before", "after"))]
    write = models[1].write

    def spoiled(folder):
        written = write(folder)
        spoil(folder / "after")
        return written

    monkeypatch.setattr(models[1], "write", spoiled)
    with pytest.raises(HeadgramError, match=words):
        compared(tmp_path, *models)
    assert not (tmp_path / "matches.parquet").exists()


def without(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file({each: tensor for each, tensor in tensors.items() if each != name}, folder / "model.safetensors")
