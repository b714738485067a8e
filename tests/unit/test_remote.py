"""Reading at the hub: against a server on this machine that speaks its routes, faults included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from at_the_hub import REPO, assert_reads
from checkpoint_files import config_bytes, llama_tensors, sharded, single
from huggingface_hub import hf_hub_download
from safetensors.torch import save

from headgram.checkpoints import hub as hub_module
from headgram.checkpoints import remote
from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError
from headgram.results.record import Provenance, Recipe
from headgram.stages.extract import extract
from headgram.study.lock import changes
from headgram.study.manifest import Row
from headgram.study.resolve import resolve


def row(**changes) -> Row:
    return Row(**({"name": "tiny", "source": REPO, "revision": None, "overrides": {}, "line": 2} | changes))


def test_reads_what_the_hub_holds_and_leaves_no_weight_in_the_cache(hub, tmp_path):
    tensors = llama_tensors()
    hub.add(REPO, {**sharded(tensors, 3), "config.json": config_bytes()})
    assert_reads(tensors)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_fetches_little_more_than_queries_and_keys(hub, monkeypatch):
    monkeypatch.setattr(remote, "_PART_BYTES", 100_000)  # so that tensors come in parts
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 768}
    tensors = llama_tensors(**sizes)
    files = sharded(tensors, 4)
    hub.add(REPO, {**files, "config.json": config_bytes(**sizes)})
    with open_checkpoint(REPO) as checkpoint:
        stack = checkpoint.stacks[0]
        checkpoint.prefetch("self", stack.layers)
        for layer in stack.layers:
            assert torch.equal(
                checkpoint.qk("self", layer)[0].flatten(0, 1), tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
            )
    assert stack.qk_bytes == 6 * (768 + 192) * 768 * 2
    assert stack.qk_bytes < hub.weight_bytes <= 1.02 * stack.qk_bytes
    assert hub.weight_bytes < 0.2 * sum(map(len, files.values()))


def test_of_a_fused_tensor_each_circuit_fetches_its_own_rows(hub, monkeypatch):
    monkeypatch.setattr(remote, "_REQUEST", 2**10)
    width = 128
    block = "gpt_neox.layers.{}.attention.{}.weight"
    modules = (("query_key_value", 3 * width), ("dense", width))
    tensors = {block.format(i, name): torch.randn(rows, width) for i in range(2) for name, rows in modules}
    hub.add(REPO, single(tensors, model_type="gpt_neox", hidden_size=width, num_key_value_heads=None))
    for roles in (("query", "key"), ("value", "output")):
        with open_checkpoint(REPO) as checkpoint:
            stack, of_headers = checkpoint.stacks[0], hub.weight_bytes
            checkpoint.prefetch("self", stack.layers, roles)
            assert hub.weight_bytes - of_headers == stack.nbytes(roles) == 2 * 2 * width * width * 4
            fused = tensors[block.format(1, "query_key_value")].view(4, 3, 32, width)
            if roles[0] == "query":
                assert torch.equal(checkpoint.factors("self", 1, roles)["key"], fused[:, 1])
            else:
                assert torch.equal(checkpoint.factors("self", 1, roles)["value"], fused[:, 2])


def test_slices_are_fetched_one_by_one(hub):
    tensors = llama_tensors()
    name = "model.embed_tokens.weight"
    hub.add(REPO, {**sharded(tensors, 3), "config.json": config_bytes()})
    with open_checkpoint(REPO) as checkpoint:
        assert checkpoint.token_tables.shape("embedding")[1] == tensors[name].shape[1]
        of_headers = hub.weight_bytes
        first = next(slices := checkpoint.token_tables.slices("embedding", 5))
        assert hub.weight_bytes - of_headers == first.numel() * first.element_size()
        assert torch.equal(torch.cat([first, *slices]), tensors[name])


def test_the_token_stays_with_the_hub(hub):
    hub.add(REPO, single(llama_tensors()))
    assert_reads(llama_tensors())
    tokens = {server: {token for where, _, token in hub.requests if where == server} for server in ("hub", "cdn")}
    assert tokens == {"hub": {"Bearer hf_secret"}, "cdn": {None}}


def test_revisions_resolve_to_commits(hub):
    old, new = (llama_tensors(seed) for seed in (1, 2))
    first = hub.add(REPO, single(old), revision="step/1000")
    second = hub.add(REPO, single(new))
    assert_reads(old, revision="step/1000")
    assert_reads(new)
    assert_reads(old, revision=first)
    assert [resolve(row(revision=revision)).commit for revision in ("step/1000", None)] == [first, second]
    assert (
        resolve(row(revision="step/1000")).fingerprint != resolve(row()).fingerprint == resolve(row(revision=second)).fingerprint
    )


def test_locks_without_reading_weights_then_extracts(hub, tmp_path):
    tensors = llama_tensors()
    commit = hub.add(REPO, {**sharded(tensors, 2), "config.json": config_bytes()})
    entry = resolve(row())
    assert (entry.commit, entry.format) == (commit, "safetensors")
    assert all(file.sample.startswith("hub:") for file in entry.files)
    assert changes("tiny", entry) == []
    hub.add(REPO, single(llama_tensors(9)))  # the branch moves on; the lock does not
    extract_entry(entry, tmp_path / "out.pt")
    weights = torch.load(tmp_path / "out.pt", weights_only=True)
    w_q, w_k = weights["query"], weights["key"]
    assert torch.equal(w_q[1].flatten(0, 1), tensors["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(w_k[0].flatten(0, 1), tensors["model.layers.0.self_attn.k_proj.weight"])


def extract_entry(entry, output: Path) -> None:
    source = entry.how_to_open()
    provenance = Provenance(Recipe("extract", "{}", entry.fingerprint, ""), "tiny", "self", "qk")
    extract(output, source, entry.stacks[0].layers, entry.stacks[0].circuits["qk"].digests, "stored", provenance)


def test_a_lock_made_at_the_hub_holds_for_a_downloaded_copy_and_the_other_way_round(hub, tmp_path):
    commit = hub.add(REPO, single(llama_tensors()))
    entry = resolve(row(revision=commit))
    hf_hub_download(REPO, "config.json", revision=commit)
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / commit
    (snapshot / "model.safetensors").write_bytes(hub.files(REPO, "main")["model.safetensors"])
    hub.requests.clear()
    assert changes("tiny", entry) == []
    extract_entry(entry, tmp_path / "out.pt")
    local = resolve(row(revision=commit))
    assert not hub.requests
    assert not local.stacks[0].circuits["qk"].digests[0].startswith("hub:")
    (snapshot / "model.safetensors").unlink()
    extract_entry(local, tmp_path / "again.pt")
    assert hub.requests


def test_a_downloaded_copy_of_another_size_is_noticed(hub, tmp_path):
    commit = hub.add(REPO, single(llama_tensors()))
    entry = resolve(row(revision=commit))
    hf_hub_download(REPO, "config.json", revision=commit)
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / commit
    (snapshot / "model.safetensors").write_bytes(hub.files(REPO, "main")["model.safetensors"][:-1])
    assert "model.safetensors of someone/tiny changed" in changes("tiny", entry)[0]


def test_a_file_that_is_not_what_was_locked_is_refused(hub, tmp_path):
    commit = hub.add(REPO, single(llama_tensors()))
    entry = resolve(row())
    hub.repos[REPO][commit] = single(llama_tensors(5))
    with pytest.raises(HeadgramError, match="changed since it was locked"):
        extract_entry(entry, tmp_path / "out.pt")


def test_a_long_header_takes_a_second_request(hub):
    tensors = llama_tensors() | {f"other.{i:05d}.weight": torch.zeros(1) for i in range(500)}
    hub.add(REPO, single(tensors))
    assert_reads(tensors)


def test_a_partial_copy_in_the_cache_is_completed_at_the_hub(hub):
    commit = hub.add(REPO, single(llama_tensors()))
    hf_hub_download(REPO, "config.json")
    assert_reads(llama_tensors())
    assert_reads(llama_tensors(), revision=commit)


def test_inspect_prints_a_model_at_the_hub(hub, tmp_path):
    commit = hub.add(REPO, single(llama_tensors()))
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    command = [sys.executable, "-m", "headgram", "inspect", REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert commit in done.stdout.replace("\n", "")
    assert not done.stderr


def test_one_request_fetches_neighbours_with_little_between():
    file = hub_module.HubFile(REPO, "a", "c", 10_000_000, "e")
    tensors = [(file, [(2010, 3010)]), (file, [(1000, 2000)]), (file, [(5000, 5002)])]
    assert remote.plan_requests(tensors) == [(file, 1000, 3010), (file, 5000, 5002)]
    columns = [(file, [(0, 100), (150, 250), (1_000_000, 1_000_100)])]  # of one tensor
    assert remote.plan_requests(columns) == [(file, 0, 250), (file, 1_000_000, 1_000_100)]


def test_quantised_weights_at_the_hub(hub):
    """All parts are fetched together; AWQ's order of columns is tested elsewhere."""
    tensors = llama_tensors(hidden_size=256)
    for name in [name for name in tensors if "q_proj" in name or "k_proj" in name]:
        outputs, inputs = tensors.pop(name).shape
        stem = name.removesuffix("weight")
        tensors[stem + "qweight"] = torch.randint(2**31, (inputs, outputs // 8), dtype=torch.int32)
        tensors[stem + "qzeros"] = torch.zeros(2, outputs // 8, dtype=torch.int32)
        tensors[stem + "scales"] = torch.ones(2, outputs, dtype=torch.float16)
    files = single(tensors, hidden_size=256, quantization_config={"quant_method": "awq", "bits": 4})
    hub.add(REPO, files)
    with open_checkpoint(REPO) as checkpoint:
        before, requests = hub.weight_bytes, len(hub.requests)
        checkpoint.prefetch("self", (0, 1))
        assert hub.weight_bytes - before <= 1.02 * checkpoint.stacks[0].qk_bytes
        fetched = len(hub.requests)
        q, k = checkpoint.qk("self", 1)
        assert (q.shape, k.shape) == ((4, 64, 256), (2, 64, 256))
        assert len(hub.requests) == fetched > requests


def test_small_parts_are_fetched_once(hub):
    """The shape of a packed weight is itself a tensor, asked for when the checkpoint is opened and again when it is read."""
    tensors = llama_tensors(hidden_size=512)
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}, "format": "pack-quantized"}
    for name in [name for name in tensors if "q_proj" in name or "k_proj" in name]:
        outputs, inputs = tensors.pop(name).shape
        tensors[name + "_packed"] = torch.zeros(outputs, inputs // 8, dtype=torch.int32)
        tensors[name + "_scale"] = torch.ones(outputs, 1)
        tensors[name + "_shape"] = torch.tensor([outputs, inputs])
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": scheme}, "format": "pack-quantized"}
    hub.add(REPO, single(tensors, hidden_size=512, quantization_config=settings))
    with open_checkpoint(REPO) as checkpoint:
        checkpoint.prefetch("self", (0, 1))
        requests = len(hub.requests)
        q, _ = checkpoint.qk("self", 1)
        assert q.unique().tolist() == [-8.0]
        assert len(hub.requests) == requests


def test_many_revisions_leave_nothing_on_the_disk(hub, tmp_path):
    for step in range(8):
        hub.add(REPO, single(llama_tensors(step)), revision=f"step{step}")
        assert_reads(llama_tensors(step), revision=f"step{step}")
    assert not list((tmp_path / "cache").rglob("*"))


def test_opening_a_checkpoint_imports_no_transformers(hub, tmp_path):
    hub.add(REPO, single(llama_tensors(), quantization_config={"quant_method": "compressed-tensors"}))
    code = f"import sys, headgram.checkpoints.known as c; c.open_checkpoint({REPO!r}); print('transformers' in sys.modules)"
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_reading_the_plan_imports_nothing_heavy():
    code = (
        "import sys, headgram.checkpoints.sources, headgram.study.lock, headgram.study.plan;"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_index_is_the_law_at_the_hub_too(hub):
    tensors, key = llama_tensors(), "model.layers.0.self_attn.q_proj.weight"
    shards = {"a.safetensors": save(tensors), "b.safetensors": save({key: torch.zeros_like(tensors[key]), "own": torch.ones(1)})}
    homes = dict.fromkeys(tensors, "a.safetensors") | {"own": "b.safetensors"}

    def files(index: dict) -> dict[str, bytes]:
        return {
            **shards,
            "config.json": config_bytes(),
            "model.safetensors.index.json": json.dumps({"weight_map": index}).encode(),
        }

    hub.add(REPO, files(homes))
    assert_reads(tensors)
    hub.add(REPO, files(homes | {"model.layers.1.self_attn.k_proj.weight": "b.safetensors"}))
    with pytest.raises(HeadgramError, match=r"is in b\.safetensors, which lacks it"):
        open_checkpoint(REPO)


def lora(alpha: float = 4, base: str = "someone/base", revision: str | None = None) -> tuple[dict[str, bytes], torch.Tensor]:
    """An adapter of one query weight, as peft saves it, and by how much it changes the weight."""
    a, b = torch.ones(2, 32), torch.arange(64.0).reshape(32, 2)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "base_model_name_or_path": base, "revision": revision}
    factors = save({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    return {"adapter_model.safetensors": factors, "adapter_config.json": json.dumps(settings).encode()}, alpha / 2 * (b @ a)


@pytest.mark.parametrize("at_the_hub", [True, False])
def test_an_adapter_and_its_base_are_each_pinned(hub, tmp_path, at_the_hub):
    tensors = llama_tensors()
    commit = hub.add("someone/base", single(tensors), revision="v1")
    hub.add("someone/base", single(llama_tensors(9)))
    files, delta = lora(revision="v1")
    hub.add(REPO, files)
    (tmp_path / "adapter").mkdir()
    for name, content in files.items():
        (tmp_path / "adapter" / name).write_bytes(content)
    manifest_row = row() if at_the_hub else row(source=str(tmp_path / "adapter"))
    entry = resolve(manifest_row)
    assert entry.base == f"someone/base@{commit}"
    assert entry.stacks[0].circuits["qk"].digests[0].startswith("hub:")
    hub.add("someone/base", single(llama_tensors(8)), revision="v1")  # both move on; the lock does not
    hub.add(REPO, lora(alpha=8)[0])
    extract_entry(entry, tmp_path / "out.pt")
    query = torch.load(tmp_path / "out.pt", weights_only=True)["query"][0].flatten(0, 1)
    plain = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(query, (plain.double() + delta.double()).float())
    if at_the_hub:
        other = resolve(manifest_row)
        assert other.fingerprint != entry.fingerprint
        assert other.base != entry.base
    given = resolve(row(source=manifest_row.source, overrides={"base": f"someone/base@{commit}"}))
    assert given.base == entry.base
