"""Which tokens directions read and write: projections, and the table."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_vocabulary import FILES, READ

from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.token_tables import TokenTables
from headgram.errors import HeadgramError
from headgram.forms.circuits import CIRCUITS, ov
from headgram.geometry import projections as module
from headgram.geometry.costs import BLOCK_BYTES
from headgram.geometry.projections import projections
from headgram.geometry.token_space import TokenProducts, between_tokens, centred_gram
from headgram.results.factors import write_factors
from headgram.results.files import written_whole
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.results.tables import read_table
from headgram.stages.composition import Composed, compose
from headgram.stages.extracted import ExtractedModel
from headgram.stages.tokens import Artifact, Written, find_tokens, unread
from headgram.study.options import Config
from tiny import write_llama, write_llama_gguf


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
    directions = torch.zeros(2, 3, 2, width)
    rows = tensors["model.embed_tokens.weight"].clone()
    rows -= rows.mean(0)
    directions[..., 0, :] = torch.nn.functional.normalize(rows[:6, :width].view(2, 3, width), dim=-1)
    by_circuit = {
        circuit: {
            stack: {"layers": torch.tensor([0, 3]), "right": directions, "left": directions} for stack in ("self", "vision")
        }
        for circuit in ("qk", "ov")
    }
    return tokens_of(tmp_path, folder, by_circuit)


def tokens_of(tmp_path, folder, by_circuit):
    """The table `tokens` of some directions, with nothing known of what stands around heads."""
    merge = Recipe("merge", "{}", "f", "c")
    path, record = tmp_path / "directions.pt", tmp_path / "merge.json"
    with written_whole(path) as file:
        torch.save(by_circuit, file)
    seal(record, Provenance(merge, "m", None), [path])
    out = Written(tmp_path / "tokens.parquet", tmp_path / "token_paths.parquet", tmp_path / "tokens.json")
    options = Config.model_validate({"tokens": {"enabled": True, "count": 4}})
    find_tokens(
        Artifact(path, record, merge.key),
        None,
        ExtractedModel({}, {}, {}),
        out,
        {"source": str(folder)},
        options,
        Provenance(Recipe("tokens", "{}", "f", "c", (merge.key,)), "m", None),
    )
    return read_table(out.tokens).to_pandas()


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


class Small:
    """A llama of random weights with gains before its layers, and what the stages before make of it."""

    def __init__(self, folder, tied=True, circuits=("qk", "ov"), weights=None, layers=3, heads=4, kv_heads=2, rank=6, width=16):
        generator = torch.Generator().manual_seed(3)
        counts = {"query": heads, "key": kv_heads, "value": kv_heads, "output": heads}
        random = {role: torch.randn(layers, n, rank, width, generator=generator) for role, n in counts.items()}
        self.weights = weights or random
        self.gains = torch.rand(layers, width, generator=generator) + 0.5
        self.final = torch.rand(width, generator=generator) + 0.5
        self.embedding = torch.randn(40, width, generator=generator) + 1
        self.unembedding = self.embedding if tied else torch.randn(43, width, generator=generator)
        tensors = {"model.embed_tokens.weight": self.embedding} | ({} if tied else {"lm_head.weight": self.unembedding})
        tensors["model.norm.weight"] = self.final
        for layer in range(layers):
            tensors[f"model.layers.{layer}.input_layernorm.weight"] = self.gains[layer]
            for role, each in self.weights.items():
                rows = each[layer].flatten(0, 1)
                name = f"model.layers.{layer}.self_attn.{role[0]}_proj.weight"
                tensors[name] = rows.T.contiguous() if role == "output" else rows.contiguous()
        self.source = write_llama(folder / "llama", layers, heads, kv_heads, rank, width, tensors=tensors)
        files, keys = {}, {}
        for circuit in circuits:
            path, extract = folder / f"{circuit}.pt", Recipe("extract", "{}", f"of {circuit}", "c")
            roles = CIRCUITS[circuit].roles
            write_factors(path, range(layers), {role: self.weights[role] for role in roles})
            seal(record_of(path), Provenance(extract, "m", "self", circuit), [path])
            files[circuit], keys[circuit] = [path], extract.key
        with open_checkpoint(self.source) as checkpoint:
            self.sources = ExtractedModel({"self": files}, keys, {"self": checkpoint.frames("self")})
        self.folder, self.keys = folder, keys

    def composed(self):
        names = ("composition.parquet", "channels.parquet", "kernels.parquet", "directions.pt", "composition.json")
        files = Composed(*(self.folder / name for name in names))
        recipe = Recipe("composition", "{}", "f", "c", tuple(self.keys.values()))
        compose(self.sources, files, Config.model_validate({"composition": {"strongest": 6}}), Provenance(recipe, "m", None))
        return Artifact(files.channels, files.record, recipe.key)

    def tokens(self, directions, channels=None):
        """Both tables, given directions by circuit and stack."""
        path, record, merge = self.folder / "directions.pt", self.folder / "merge.json", Recipe("merge", "{}", "f", "c")
        with written_whole(path) as file:
            torch.save(directions, file)
        seal(record, Provenance(merge, "m", None), [path])
        out = Written(*(self.folder / name for name in ("tokens.parquet", "token_paths.parquet", "tokens.json")))
        upstream = (merge.key, *self.keys.values(), *([channels.key] if channels else []))
        provenance = Provenance(Recipe("tokens", "{}", "f", "c", upstream), "m", None)
        options = Config.model_validate({"tokens": {"enabled": True, "count": 4}})
        find_tokens(Artifact(path, record, merge.key), channels, self.sources, out, {"source": self.source}, options, provenance)
        return [read_table(table).to_pandas() for table in (out.tokens, out.paths)]

    def form(self, circuit, layer, head):
        """A head's form with the norm before it folded in, float64."""
        roles = CIRCUITS[circuit].roles
        own, shared = (self.weights[role][layer].double() for role in roles)
        own, shared = own[head], shared[head * len(shared) // len(own)]
        gain = self.gains[layer].double()
        return (shared * gain).T @ (own * gain) if circuit == "qk" else own.T @ (shared * gain)


def scores_of(matrix, null):
    """The scores of a matrix of tokens by tokens, by the definition; `null` is the form whose trace is held against chance."""
    values = torch.linalg.eigvals(matrix)
    energy = values.abs().square().sum()
    return {
        "copying": (values.real.sum() / values.abs().sum()).item(),
        "positive": (values.abs().square()[values.real > 1e-9 * values.abs().max()].sum() / energy).item(),
        "departure": ((matrix.square().sum() - energy).clamp_min(0).sqrt() / matrix.norm()).item(),
        "trace_z": (matrix.trace() * len(null) ** 0.5 / null.norm()).item(),
    }


@pytest.mark.parametrize("block", [2**30, 4 * 6 * 16 * 4])
@pytest.mark.parametrize("tied", [True, False])
def test_paths_between_tokens_are_their_definition(tmp_path, monkeypatch, tied, block):
    """Dense matrices of all tokens by all tokens; the output matrix may have more rows than there are embeddings."""
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block)
    monkeypatch.setattr("headgram.stages.tokens._SLICE_BYTES", 4 * 16 * 7)
    model = Small(tmp_path, tied)
    channels = model.composed()
    _, paths = model.tokens({}, channels)
    e, u = model.embedding.double(), model.unembedding[:40].double() * model.final.double()
    e, u = e - e.mean(0), u - u.mean(0)
    assert paths["path"].value_counts().to_dict() == {"qk": 12, "ov": 12, "k": 6}
    assert paths["folded"].all()
    pair = ["layer_a", "head_a", "layer", "head"]
    strongest = read_table(channels.path).to_pandas().query("kind == 'k'").rename(columns={"layer_b": "layer", "head_b": "head"})
    assert paths.query("path == 'k'")[pair].astype(int).to_numpy().tolist() == strongest[pair].to_numpy().tolist()
    for row in paths.itertuples():
        left = u if row.path == "ov" else e
        form = model.form("ov" if row.path == "ov" else "qk", row.layer, row.head)
        if row.path == "k":
            form = model.form("ov", int(row.layer_a), int(row.head_a)).T @ form
        else:
            assert np.isnan(row.layer_a)
        for name, expected in scores_of(left @ form @ e.T, (e.T @ left) @ form).items():
            assert getattr(row, name) == pytest.approx(expected, abs=1e-6), name  # folded factors are kept in float32


def test_chance_of_paths_is_that_of_heads_turned_at_random():
    generator = torch.Generator().manual_seed(0)
    width, turns = 12, 4000
    tables = [torch.randn(30, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    both = centred_gram([torch.cat(tables, 1)])
    products = TokenProducts(both[:width, :width], both[width:, width:], both[width:, :width])
    w_v, w_o = torch.randn(2, 1, 3, width, generator=generator, dtype=torch.float64)
    turned, upper = torch.linalg.qr(torch.randn(turns, width, width, generator=generator, dtype=torch.float64))
    turned = turned * upper.diagonal(dim1=1, dim2=2).sign()[:, None]
    found = between_tokens(ov(w_v @ turned, w_o.expand(turns, -1, -1)), products)
    assert abs(found.copying.mean()) < 4 * found.copying.std() / turns**0.5
    assert abs(found.positive.mean() - 0.5) < 4 * found.positive.std() / turns**0.5
    assert abs(found.trace_z.mean()) < 4 / turns**0.5
    assert abs(found.trace_z.std() - 1) < 0.05


def test_a_circuit_of_one_kind_has_its_own_paths_alone(tmp_path):
    _, paths = Small(tmp_path, circuits=("qk",)).tokens({})
    assert set(paths["path"]) == {"qk"}


def test_an_induction_circuit_looks_for_tokens_that_follow_one_like_its_own(tmp_path):
    """As in test_composition, with the token in the first channels, what came before in others; random heads beside it."""
    token, before = torch.zeros(2, 6, 16)
    token[:, :6] = before[:, 10:] = torch.eye(6)
    generator = torch.Generator().manual_seed(1)
    weights = {role: torch.randn(2, 4, 6, 16, generator=generator) for role in ("query", "key", "value", "output")}
    weights["value"][0, 1], weights["output"][0, 1] = token, before
    for role, made in {"query": token, "key": before, "value": token, "output": token}.items():
        weights[role][1, 2] = made
    model = Small(tmp_path, weights=weights, layers=2, kv_heads=4)
    _, paths = model.tokens({}, model.composed())
    first = paths.query("path == 'k'").iloc[0]
    assert first[["layer_a", "head_a", "layer", "head"]].tolist() == [0, 1, 1, 2]
    copying = paths.query("path == 'ov' and layer == 1 and head == 2").iloc[0]
    for row in (first, copying):
        assert row["copying"] == pytest.approx(1)
        assert row["positive"] == pytest.approx(1)


@pytest.mark.parametrize("known", [True, False])
def test_rows_are_projected_on_directions_before_the_norm_where_it_is_known(tmp_path, known):
    model = Small(tmp_path)
    if not known:
        model.sources = ExtractedModel({}, {}, {})
    directions = torch.nn.functional.normalize(torch.randn(3, 4, 2, 16, generator=torch.Generator().manual_seed(5)), dim=-1)
    directions[0, 0, 1] = 0
    found = {"layers": torch.arange(3), "right": directions, "left": directions}
    table, _ = model.tokens({"qk": {"self": found}, "qk-folded": {"self": found}, "ov": {"self": found}})
    assert len(table) == 3 * 2 * (3 * 4 * 2 - 1) * 2 * 4
    e = model.embedding.double() - model.embedding.double().mean(0)
    for row in table.sample(60, random_state=0).itertuples():
        reads = (row.circuit, row.side) != ("ov", "left")
        assert row.folded == (not reads or known or row.circuit == "qk-folded")
        gain = 1 if row.circuit == "qk-folded" or (reads and not known) else model.gains[row.layer] if reads else model.final
        direction = torch.nn.functional.normalize(directions[row.layer, row.head, row.direction].double() * gain, dim=0)
        values = (e @ direction).sort(descending=row.sign > 0).values
        assert row.value == pytest.approx(values[row.place].item(), rel=1e-4)
        assert row.deviations == pytest.approx((values[row.place] / values.square().mean().sqrt()).item(), rel=1e-4)


def test_the_output_reads_what_the_last_norm_hands_on_of_a_direction(tmp_path):
    """LayerNorm takes the mean over channels away before its gain, and not after: `<row, gain * C v>`."""
    generator = torch.Generator().manual_seed(6)
    shapes = {"h.0.attn.c_attn.weight": (16, 48), "h.0.attn.c_proj.weight": (16, 16), "wte.weight": (40, 16), "ln_f.bias": (16,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["ln_f.weight"] = torch.rand(16, generator=generator) + 0.1
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    v = torch.nn.functional.normalize(torch.randn(1, 2, 2, 16, generator=generator), dim=-1)
    table = tokens_of(tmp_path, tmp_path, {"ov": {"self": {"layers": torch.tensor([0]), "right": v, "left": v}}})
    rows, norm = tensors["wte.weight"].double(), torch.nn.LayerNorm(16, eps=0, bias=False, dtype=torch.float64)
    norm.weight.data = tensors["ln_f.weight"].double()
    left = table.query("side == 'left'")
    assert left["folded"].all()
    for row in left.itertuples():
        logits = rows @ norm(v[0, row.head, row.direction].double())
        logits -= logits.mean()
        expected = (logits / logits.square().mean().sqrt()).sort(descending=row.sign > 0)
        assert row.token == expected.indices[row.place]
        assert row.deviations == pytest.approx(expected.values[row.place].item(), rel=1e-4)


def test_an_output_matrix_of_its_own_does_not_read_what_an_encoder_writes():
    """As of T5 1.1; a table that serves as both is what tokens enter as, too."""
    own, tied = ({"embedding": "shared.weight", "unembedding": name} for name in ("lm_head.weight", "shared.weight"))
    store = SimpleNamespace(shape=lambda name: (40, 16))
    assert unread(TokenTables(own, {}, store), "unembedding", "encoder", 16) == "lm_head.weight reads the decoder's stream"
    for names, table, stack in ((own, "embedding", "encoder"), (own, "unembedding", "decoder"), (tied, "unembedding", "encoder")):
        assert unread(TokenTables(names, {}, store), table, stack, 16) is None


@pytest.mark.parametrize("gain", [torch.ones(9), torch.full((16,), torch.nan)])
def test_a_last_norm_that_cannot_be_is_named(tmp_path, gain):
    model = Small(tmp_path)
    tensors = load_file(model.source / "model.safetensors")
    save_file(tensors | {"model.norm.weight": gain}, model.source / "model.safetensors")
    with pytest.raises(HeadgramError, match=r"model m: tensor model.norm.weight should be finite numbers"):
        model.tokens({})


def test_a_base_model_without_an_output_matrix_has_what_its_heads_look_for(tmp_path):
    """Its last norm is there, and nothing to be held against what passes it."""
    model = Small(tmp_path)
    config = json.loads((model.source / "config.json").read_text())
    (model.source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    _, paths = model.tokens({})
    assert set(paths["path"]) == {"qk"}


def test_a_model_without_embeddings_has_an_empty_table(tmp_path, capsys):
    folder = write_llama(tmp_path / "llama", layers=4)
    table = written(tmp_path, folder, width=16)
    assert table.empty
    said = capsys.readouterr().out
    assert "qk, self, right: without tokens: the rows of model.embed_tokens.weight have width 32, and its stream 16" in said
    assert "qk, vision, left: without tokens: its stream holds no tokens as the model embeds them" in said
    assert np.dtype(table["value"].dtype) == np.float32
