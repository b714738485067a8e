"""Locks and lists that somebody forged are refused in one sentence, or can be planned."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forged_results import PER_CASE, VALUES, changed, places
from hypothesis import given
from hypothesis import strategies as st
from locked import locked_llama

from headgram.errors import HeadgramError, UnknownTypeError
from headgram.foreign import parse_json
from headgram.results.asked import ask_for, asked_for, given_to
from headgram.results.claims import claimed
from headgram.results.record import is_fresh, read_record
from headgram.run.startup import _read_sightings
from headgram.study.lock import Lock, lock_path, missing_rows, read_lock, write_lock
from headgram.study.manifest import read_manifest
from headgram.study.options import Config, read_options
from headgram.study.plan import make_plan

SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"


LOCK = Lock(models={"m": locked_llama(layers=2)}).model_dump(mode="json")


@given(st.sampled_from(list(places(LOCK))[1:]), st.sampled_from([..., *VALUES]))
@PER_CASE
def test_any_lock_is_refused_in_one_sentence_or_can_be_planned(tmp_path, place, value):
    path = lock_path(tmp_path / "models.tsv")
    path.write_text(json.dumps(changed(LOCK, place, value)) if value != 10**400 else big(changed(LOCK, place, "BIG")))
    try:
        lock = read_lock(path)
    except HeadgramError as error:
        sentence = str(error)
        assert sentence.isprintable() and "delete it" in sentence  # noqa: PT018
        return
    (tmp_path / "models.tsv").write_text("name\tsource\nm\tmodels/m\n")
    missing_rows(read_manifest(tmp_path / "models.tsv").rows, lock)
    with contextlib.suppress(UnknownTypeError):
        records = make_plan(lock.models, Config(), SCRIPTS).records()
        assert len(records) < 100
        assert all(".." not in name and not name.startswith("/") for name in records)


def big(value: Any) -> str:
    return json.dumps(value).replace('"BIG"', "1" + "0" * 400)


def test_a_key_that_stands_twice_in_a_lock_is_refused(tmp_path):
    text = json.dumps(LOCK)
    for name in ("models", "m", "stacks", "rank", "fingerprint"):
        (tmp_path / "a.lock.json").write_text(text.replace(f'"{name}": ', f'"{name}": 1, "{name}": ', 1))
        with pytest.raises(HeadgramError, match=f"the key '{name}' stands there twice"):
            read_lock(tmp_path / "a.lock.json")


def test_a_key_that_stands_twice_among_many_is_found_at_once():
    content = "{" + ", ".join(f'"{i}": 1' for i in (*range(200_000), 7)) + "}"
    start = time.process_time()
    with pytest.raises(ValueError, match="the key '7' stands there twice"):
        parse_json(content.encode())
    assert time.process_time() - start < 10


@pytest.mark.parametrize("read", [read_record, read_lock, lambda path: claimed(path.parent) or read_lock(path)])
def test_values_of_a_few_bytes_that_take_much_memory_are_not_parsed(tmp_path, read):
    content = b'{"a": [' + b"{}," * (20 * 2**20) + b"{}]}"
    for name in ("a.json", ".claims.json"):
        (tmp_path / name).write_bytes(content)
    start = time.process_time()
    with pytest.raises(HeadgramError, match="it holds more than 2,097,152 values"):
        read(tmp_path / "a.json")
    assert time.process_time() - start < 2


def test_what_is_locked_can_be_read(tmp_path):
    write_lock(tmp_path / "a.lock.json", {"m": locked_llama()})
    assert read_lock(tmp_path / "a.lock.json").models == {"m": locked_llama()}


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lock": ("models.lock.json", read_lock),
    "manifest": ("models.tsv", read_manifest),
    "options": ("config.yaml", lambda path: read_options(path, {})),
    "record": ("m.json", read_record),
    "fresh": ("m.json", lambda path: is_fresh(path, "key")),
    "claims": (".claims.json", lambda path: claimed(path.parent)),
    "sightings": (".sources.json", _read_sightings),
    "plan": (".plan.json", lambda path: (asked_for(path.parent), given_to(path.parent))),
    "a run's beginning": (".plan.json", lambda path: ask_for(path.parent, {})),
}


TEXTS = {
    "no text": b"\xff\xfe",
    "surrogates": b'{"a": "\\ud800"}',
    "nested": b"[" * 10**6,
    "a list": b"[]",
    "digits": b"9" * 10**4,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "kind", ["pipe", "/dev/zero", "folder", "a terabyte", "not text", "surrogates", "nested", "a list", "digits"]
)
def test_a_file_of_a_study_that_never_ends_or_is_none_is_no_trap(tmp_path, reader, kind):
    name, read = READERS[reader]
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "a terabyte":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind in TEXTS:
        path.write_bytes(TEXTS[kind])
    else:
        path.symlink_to(kind)
    start = time.monotonic()
    try:
        read(path)
    except HeadgramError as error:
        assert all(line.isprintable() for line in str(error).splitlines())  # noqa: PT017
    except OSError as error:
        assert reader == "a run's beginning", error  # noqa: PT017  (said by the run that begins)
    assert time.monotonic() - start < 10
