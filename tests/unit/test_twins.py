"""Random twins: everything that a head is by itself stays, whatever heads have in common is chance."""

import math

import pytest
import torch
from typer.testing import CliRunner

import headgram
from headgram.cli import app
from headgram.errors import HeadgramError
from headgram.geometry.nulls import cosine_null, symmetry_null
from headgram.study.manifest import add_twin, read_manifest
from headgram.study.resolve import resolve
from tiny import write_llama, write_llama_gguf, write_manifest

ROLES = ("query", "key", "value", "output")
#: Heads, key heads, rank and width: grouped or not, as wide as high, of more rows than columns.
SHAPES = [(4, 2, 4, 24), (4, 4, 6, 24), (2, 1, 8, 8), (2, 2, 12, 8)]


def write_whole_llama(folder, layers, heads, kv_heads, rank, hidden, dtype, equal=False):
    """A llama with all four roles; if `equal`, all its factors are one."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(rank, hidden, generator=generator, dtype=dtype)
    tensors = {}
    for layer in range(layers):
        for role, count in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("o", heads)):
            weight = torch.randn(count * rank, hidden, generator=generator, dtype=dtype)
            weight = one.repeat(count, 1) if equal else weight
            tensors[f"model.layers.{layer}.self_attn.{role}_proj.weight"] = (weight.T if role == "o" else weight).contiguous()
    return write_llama(folder, layers, heads, kv_heads, rank, hidden, tensors=tensors)


def both(source, seed: int = 1):
    return headgram.open_checkpoint(source), headgram.open_checkpoint(source, overrides={"twin": seed})


@pytest.mark.parametrize(("heads", "kv_heads", "rank", "hidden"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_spectra_stay(tmp_path, heads, kv_heads, rank, hidden, dtype):
    source = write_whole_llama(tmp_path / "model", 2, heads, kv_heads, rank, hidden, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for model, twin in [both(source)]:
        assert [(s.name, s.layers, s.heads, s.kv_heads, s.rank, s.hidden, s.roles) for s in model.stacks] == [
            (s.name, s.layers, s.heads, s.kv_heads, s.rank, s.hidden, s.roles) for s in twin.stacks
        ]
        for layer in range(2):
            old, new = model.factors("self", layer), twin.factors("self", layer)
            for role in ROLES:
                assert new[role].shape == old[role].shape
                assert new[role].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert not torch.allclose(new[role].double(), old[role].double(), atol=0.1)
                grams = [weights.double() @ weights.double().mT for weights in (old[role], new[role])]
                assert float((grams[1] - grams[0]).norm() / grams[0].norm()) < tolerance
            for a, b in (("query", "key"), ("value", "output")):
                before = headgram.spectrum(*((old[a], old[b]) if a == "query" else (old[b], old[a])), topk=1)
                after = headgram.spectrum(*((new[a], new[b]) if a == "query" else (new[b], new[a])), topk=1)
                torch.testing.assert_close(
                    after.singular_values, before.singular_values, rtol=0, atol=tolerance * float(before.spectral_norm.max())
                )


def test_what_heads_have_in_common_is_chance(tmp_path):
    """A model whose heads are all one and the same, and symmetric: of its twin neither is left."""
    source = write_whole_llama(tmp_path / "model", 6, 16, 16, 4, 24, torch.float32, equal=True)
    model, twin = both(source)
    symmetry = {}
    for name, checkpoint in (("model", model), ("twin", twin)):
        queries, keys = (torch.stack(side) for side in zip(*(checkpoint.qk("self", n) for n in range(6)), strict=True))
        symmetry[name] = torch.stack([headgram.spectrum(*pair).symmetry for pair in zip(queries, keys, strict=True)])
        products = headgram.gram(queries, keys, queries, keys)
        norms = products.diagonal().T.sqrt()
        cosine = (products / norms[:, None] / norms)[tuple(torch.triu_indices(6, 6, 1))]
        if name == "model":
            assert float(cosine.min()) > 0.999
            assert float(symmetry[name].min()) > 0.999
    for values, null in ((cosine, cosine_null(24)), (symmetry["twin"], symmetry_null(24))):
        count = values.numel()
        assert float(values.mean()) == pytest.approx(null.mean, abs=4 * null.deviation / math.sqrt(count))
        assert float(values.std()) == pytest.approx(null.deviation, rel=5 / math.sqrt(2 * count))


def test_a_number_is_a_twin(tmp_path):
    """The same wherever and in whatever order it is read; another number, layer, role or head gives other rotations."""
    source = write_whole_llama(tmp_path / "model", 2, 4, 4, 4, 16, torch.float32, equal=True)
    whole = headgram.open_checkpoint(source, overrides={"twin": 1})
    alone = headgram.open_checkpoint(source, overrides={"twin": 1}).factors("self", 1, ["output"])["output"]
    assert torch.equal(whole.factors("self", 1)["output"], alone)
    other = headgram.open_checkpoint(source, overrides={"twin": 2})
    every = [twin.factors("self", layer)[role] for twin in (whole, other) for layer in (0, 1) for role in ROLES]
    heads = torch.cat(every).flatten(1)
    assert len(heads) == 2 * 2 * 4 * 4
    assert float((torch.cdist(heads, heads) + 10 * torch.eye(len(heads))).min()) > 0.1
    assert "random twin 1" in " ".join(whole.remarks)


def test_a_gguf_has_a_twin(tmp_path):
    write_llama_gguf(tmp_path / "model.gguf")
    model, twin = both(tmp_path / "model.gguf")
    old, new = (headgram.spectrum(*checkpoint.qk("self", 1)) for checkpoint in (model, twin))
    torch.testing.assert_close(new.singular_values, old.singular_values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", [0, -1, "1", True, 1.0])
def test_other_numbers_are_refused(tmp_path, seed):
    source = write_whole_llama(tmp_path / "model", 1, 2, 2, 4, 8, torch.float32)
    with pytest.raises(HeadgramError, match="override twin is .* positive whole number"):
        headgram.open_checkpoint(source, overrides={"twin": seed})


def test_the_command_adds_a_row(tmp_path):
    write_whole_llama(tmp_path / "model", 1, 2, 2, 4, 8, torch.float32)
    manifest = write_manifest(tmp_path / "models.tsv", {"one": tmp_path / "model", "two": tmp_path / "model"})
    before = manifest.read_text().splitlines()
    done = CliRunner().invoke(app, ["null", "one", "--manifest", str(manifest)])
    assert done.exit_code == 0, done.output
    assert manifest.read_text().splitlines() == [before[0] + "\ttwin", *before[1:], f"one-null\t{tmp_path / 'model'}\t\t1"]
    assert add_twin(manifest, "one", 7) == "one-null-7"
    rows = {row.name: row for row in read_manifest(manifest).rows}
    assert {name: row.overrides for name, row in rows.items()} == {
        "one": {},
        "two": {},
        "one-null": {"twin": 1},
        "one-null-7": {"twin": 7},
    }
    entries = {name: resolve(row) for name, row in rows.items()}
    assert len({entry.fingerprint_of("qk") for entry in entries.values()}) == 3
    assert entries["one-null"].how_to_open()["overrides"] == {"twin": 1}


@pytest.mark.parametrize(
    ("text", "model", "sentence"),
    [
        ("name\tsource\na\tx\n", "b", "has no model 'b'; there are: a"),
        ("name\tsource\ttwin\na\tx\t3\n", "a", "is a random twin itself"),
        ("name\tsource\na\tx\na-null\tx\n", "a", "'a-null' is in it already"),
        (f"name\tsource\n{'a' * 99}\tx\n", "a" * 99, "too long a name"),
        ("name\tsource\na\tx\nb\t\n", "a", "the source is missing"),
    ],
)
def test_what_has_no_twin_is_said_and_nothing_is_written(tmp_path, text, model, sentence):
    (tmp_path / "models.tsv").write_text(text)
    with pytest.raises(HeadgramError, match=sentence):
        add_twin(tmp_path / "models.tsv", model)
    assert (tmp_path / "models.tsv").read_text() == text


def test_a_twin_of_a_lineage_is_none_of_it_and_comments_stay(tmp_path):
    path = tmp_path / "models.tsv"
    path.write_bytes("\ufeff# a study\r\nname\tstep\tsource\tlineage\tnote\r\na\t0\tx\tl\tgood\r\n# the end".encode())
    add_twin(path, "a")
    (row, twin) = read_manifest(path).rows
    assert (twin.name, twin.source, twin.overrides, twin.labels.lineage) == ("a-null", "x", {"twin": 1}, "")
    assert twin.labels.others == {"note": "good", "twin": "1"}
    assert (row.labels.step, path.read_text().count("#")) == (0.0, 2)
