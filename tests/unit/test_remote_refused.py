"""A hub that is slow, wrong, hostile or away is waited for or refused, and the sentence says what to do."""

from __future__ import annotations

import json
import time

import pytest
import torch
from at_the_hub import REPO, assert_reads
from checkpoint_files import config_bytes, llama_tensors, safetensors_bytes, sharded, single
from hub_server import Fault
from huggingface_hub import constants

from headgram.checkpoints import answers
from headgram.checkpoints import hub as hub_module
from headgram.checkpoints.known import open_checkpoint
from headgram.errors import HeadgramError


def test_a_server_that_ignores_ranges_is_refused(hub):
    hub.add(REPO, single(llama_tensors()))
    hub.fault = Fault(status=200)
    with pytest.raises(HeadgramError, match="ignores byte ranges"):
        open_checkpoint(REPO)


def test_a_file_that_shrank_is_refused(hub):
    hub.add(REPO, single(llama_tensors()))
    hub.fault = Fault(total=1000)
    with pytest.raises(HeadgramError, match="changed at the hub"):
        open_checkpoint(REPO)


def test_a_file_with_another_hash_is_refused(hub):
    hub.add(REPO, single(llama_tensors()))
    hub.etag = "0" * 64
    with pytest.raises(HeadgramError, match="changed at the hub"):
        open_checkpoint(REPO)


def test_a_lost_connection_is_taken_up_where_it_broke(hub):
    tensors = llama_tensors()
    hub.add(REPO, single(tensors))
    with open_checkpoint(REPO) as checkpoint:
        hub.weight_bytes, hub.fault = 0, Fault(times=3, drop_after=100)
        q, _ = checkpoint.qk("self", 0)
        assert torch.equal(q.flatten(0, 1), tensors["model.layers.0.self_attn.q_proj.weight"])
        k_and_q = (32 + 16) * 32 * 2
        assert hub.weight_bytes == k_and_q  # nothing came twice


def test_a_connection_that_stays_lost_is_given_up(hub):
    hub.add(REPO, single(llama_tensors()))
    hub.fault = Fault(drop_after=0)
    with pytest.raises(HeadgramError, match="in a row"):
        open_checkpoint(REPO)


@pytest.mark.parametrize(
    "target", ["/someone/tiny/resolve/main/model.safetensors", "file:///etc/passwd", "http://[", "gopher://x"]
)
def test_redirects_that_lead_nowhere(hub, target):
    hub.add(REPO, single(llama_tensors()))
    hub.fault = Fault(status=302, headers={"Location": target})
    with pytest.raises(HeadgramError, match=r"in a row|changed at the hub"):
        open_checkpoint(REPO)


def test_a_limited_rate_is_waited_for(hub):
    hub.add(REPO, single(llama_tensors()))
    hub.listing_fault = Fault(times=1, status=429, headers={"Retry-After": "0"})
    hub.fault = Fault(times=1, status=429, headers={"Retry-After": "0"})
    assert_reads(llama_tensors())


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            Fault(status=403, headers={"X-Error-Code": "GatedRepo"}),
            r"is gated: accept its licence at .*someone/tiny.*hf auth login",
        ),
        (Fault(status=401), r"refuses|no model '.*hf auth login"),
        (Fault(status=403), "hf auth login"),
        (Fault(status=404), "the hub answers 404"),
        (Fault(status=416), "shorter than the hub's listing says"),
    ],
)
def test_refusals_say_what_to_do(hub, fault, sentence):
    hub.add(REPO, single(llama_tensors()))
    hub.listing_fault = fault
    with pytest.raises(HeadgramError, match=sentence):
        open_checkpoint(REPO)
    hub.listing_fault, hub.fault = None, fault
    with pytest.raises(HeadgramError, match=sentence):
        open_checkpoint(REPO)


@pytest.mark.parametrize("how", ["endless", "bomb", "drops"])
@pytest.mark.parametrize("part", ["/api/models/", "config.json", ".index.json"])
def test_bodies_that_never_end_are_given_up(hub, monkeypatch, part, how):
    """In time and in memory, for the server's process is this one."""
    monkeypatch.setattr(answers, "_WINDOW", 0.3)
    monkeypatch.setattr(hub_module, "_LARGEST_LISTING", 2**20)
    hub.add(REPO, {**sharded(llama_tensors(), 2), "config.json": config_bytes()})
    hub.bodies[part] = how
    start = time.monotonic()
    with pytest.raises(HeadgramError, match="sends more of|compresses what|less than a kilobyte a second") as caught:
        open_checkpoint(REPO)
    assert str(caught.value).isprintable()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("seconds", ["86400", "999999999", "1" * 30])
def test_a_hub_that_wants_to_be_asked_tomorrow_is_not_waited_for(hub, seconds):
    hub.add(REPO, single(llama_tensors()))
    for name in ("listing_fault", "fault"):
        hub.listing_fault = hub.fault = None
        setattr(hub, name, Fault(status=429, headers={"Retry-After": seconds}))
        with pytest.raises(HeadgramError, match="429"):
            open_checkpoint(REPO)


@pytest.mark.parametrize("commit", ["../../etc", "/etc/passwd", "main", "a" * 1000, "\x1b[2J", "..", "abc/def", "ABCDEFABC"])
def test_a_commit_that_is_none_is_refused(hub, commit):
    files = [{"rfilename": "model.safetensors", "size": 10, "blobId": "a"}]
    hub.listing = json.dumps({"sha": commit, "siblings": files}).encode()
    with pytest.raises(HeadgramError, match="names no commit"):
        open_checkpoint(REPO)


@pytest.mark.parametrize("size", [1, 10**6, 2**40, 2**63, -1, 1.5, "12", None])
def test_a_configuration_of_another_size_than_listed_is_refused(hub, size):
    files = single(llama_tensors())
    hub.add(REPO, files)
    listed = {"rfilename": "model.safetensors", "size": len(files["model.safetensors"]), "blobId": "a"}
    config = {"rfilename": "config.json", "size": size, "blobId": "a"}
    hub.listing = json.dumps({"sha": hub.refs[REPO, "main"], "siblings": [listed, config]}).encode()
    with pytest.raises(HeadgramError, match="sends more of|sends less of|larger than|does not understand"):
        open_checkpoint(REPO)


def test_unknown_repositories_and_revisions(hub):
    hub.add(REPO, single(llama_tensors()))
    with pytest.raises(HeadgramError, match="no model 'someone/else'"):
        open_checkpoint("someone/else")
    with pytest.raises(HeadgramError, match="no revision 'step9'"):
        open_checkpoint(REPO, "step9")


@pytest.mark.parametrize(
    "listing",
    [
        b"", b"<html>", b"[]", b"[" * 100_000, b"{}", b'{"sha": "abc", "siblings": 3}', b'{"sha": "abc", "siblings": [{}]}',
        b'{"sha": "abc", "siblings": [{"rfilename": "model.safetensors"}]}',
        b'{"sha": "abc", "siblings": [{"rfilename": "model.safetensors", "size": -1, "blobId": "a"}]}',
        b'{"sha": "abc", "siblings": [{"rfilename": "model.safetensors", "size": 10}]}',
        b'{"siblings": [{"rfilename": "model.safetensors", "size": 10, "blobId": "a"}]}',
    ],
)  # fmt: skip
def test_listings_that_make_no_sense(hub, listing):
    hub.listing = listing
    with pytest.raises(HeadgramError, match=r"does not understand|holds no \.safetensors|names no commit"):
        open_checkpoint(REPO)


def test_offline_mode_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HeadgramError, match=r"HF_HUB_OFFLINE.*hf download"):
        open_checkpoint(REPO)
    assert not hub.requests


def test_an_unreachable_hub_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HeadgramError, match=r"neither a path .* nor in the local .* cannot be reached at http://127"):
        open_checkpoint(REPO)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"pytorch_model.bin": b"x"}, "only safetensors can be read at the hub"),
        ({"model.gguf": b"x"}, "only safetensors can be read at the hub"),
        ({"README.md": b"x"}, "holds no .safetensors"),
        ({"model.safetensors": (200_000_000).to_bytes(8, "little") + bytes(100)}, "header claims 200000000 bytes"),
        ({"model.safetensors": b"abc"}, "not a whole safetensors file"),
        ({"model.safetensors": b""}, "not a whole safetensors file"),
        ({"model.safetensors": safetensors_bytes(b"[]")}, "no JSON object"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'}, "leads out of"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "absent.safetensors"}}'}, "lacks the file"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "/etc/passwd"}}'}, "leads out of"),
        ({"model.safetensors.index.json": b"[" * 100_000}, "not valid JSON"),
    ],
)
def test_what_cannot_be_read_at_the_hub(hub, files, sentence):
    hub.add(REPO, {"config.json": config_bytes(), **files})
    with pytest.raises(HeadgramError, match=sentence):
        open_checkpoint(REPO)
