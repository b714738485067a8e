"""Records and tables that somebody forged are refused or named, whatever they hold."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forged_results import DERIVE, MERGE, PER_CASE, VALUES, changed, made, places, seal_again, sentences, write
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from headgram.atlas.export import export_csv
from headgram.atlas.reader import open_atlas
from headgram.atlas.repair import repair
from headgram.atlas.verify import blamed_on_damage, verify
from headgram.cli import app
from headgram.errors import HeadgramError
from headgram.results.claims import Writing, claim, settle
from headgram.results.paths import DERIVED, MERGED, Results
from headgram.results.record import Provenance, _sealed_text, canonical, is_fresh


def read(path: Path) -> pa.Table:
    return pq.read_table(path.open("rb"))


@pytest.fixture(scope="module")
def record_content(tmp_path_factory) -> dict:
    return json.loads((made(tmp_path_factory.mktemp("whole") / "results") / "provenance" / "m.json").read_text())


@given(st.data())
@PER_CASE
def test_whatever_a_sealed_record_holds_verify_goes_on_to_the_end(tmp_path_factory, record_content, data):
    results = tmp_path_factory.getbasetemp() / "forged-records"
    if not results.exists():
        made(results)
    place = data.draw(st.sampled_from(list(places(record_content))[1:]), label="place")
    content = changed(record_content, place, data.draw(st.sampled_from([..., *VALUES]), label="value"))
    content.pop("record", None)
    record = results / "provenance" / "m.json"
    record.write_text(_sealed_text(content), encoding="utf-8")
    (results / "models.json").write_text("")  # no folder of artifacts
    (results / "provenance" / "broken.json").write_text("{")
    found = sentences(results)
    assert any("broken.json" in sentence for sentence in found)
    is_fresh(record, "key")
    with contextlib.suppress(HeadgramError):  # a record that cannot be read says of nothing that it is headgram's
        claim(results, [Writing(record, [record])])
    settle(results)
    assert repair(results, verify(results)[1], {}) is not None


#: What may stand in the metadata of a table, given what should.
METADATA: dict[str, Callable[[dict], bytes | None]] = {
    "a list": lambda _: b"[1, 2]",
    "a number": lambda _: b"1",
    "an empty object": lambda _: b"{}",
    "nothing": lambda _: None,
    "no text": lambda _: b"\xff\xfe",
    "brackets without end": lambda _: b"[" * 10**5,
    "thousands of digits": lambda _: b"9" * 5000,
    "another key": lambda said: canonical({**said, "key": "other"}).encode(),
    "lists of objects": lambda said: canonical({name: [{}] for name in said}).encode(),
}


#: What a table may be, given what it should.
CONTENT: dict[str, Callable[[pa.Table], pa.Table]] = {
    "no columns": lambda table: table.select([]),
    "a column less": lambda table: table.drop_columns(table.column_names[-1]),
    "a column more": lambda table: table.append_column("\x1b[2J", pa.array([1])),
    "two columns of one name": lambda table: table.append_column(table.column_names[-1], pa.array([1])),
    **{
        f"{value!r:.20} everywhere": lambda table, value=value: pa.table({name: [value] for name in table.column_names})
        for value in ("x", None, [1.0], {"a": {"b": 1}}, b"\xff", True)
    },
    "the largest numbers": lambda table: numbers(table, 2**31 - 1, 1e308),
    "negative numbers": lambda table: numbers(table, -(2**31), -1e308),
    "no numbers": lambda table: numbers(table, 0, np.nan),
    "infinite numbers": lambda table: numbers(table, 0, -np.inf),
}


def _footer(content: bytes) -> int:
    """Where the footer of a Parquet file begins."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


#: What the bytes of a table may be, given what they should.
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "no Parquet": lambda _: b"PAR1" + b"abc" * 300 + b"PAR1",
    "half of it": lambda content: content[: len(content) // 2],
    "a broken footer": lambda content: content[: (start := _footer(content))] + bytes(192) + content[start + 192 :],
}


FORGERIES = [(what, kind) for what, kinds in (("metadata", METADATA), ("content", CONTENT), ("bytes", BYTES)) for kind in kinds]


def forge(path: Path, what: str, kind: str, said: dict) -> None:
    table = read(path)
    if what == "bytes":
        path.write_bytes(BYTES[kind](path.read_bytes()))
    elif what == "content":
        write(path, CONTENT[kind](table), {b"headgram": canonical(said).encode()})
    else:
        text = METADATA[kind](said)
        write(path, table, None if text is None else {b"headgram": text})


def numbers(table: pa.Table, integer: int, real: float) -> pa.Table:
    columns = {field.name: table[field.name] for field in table.schema}
    for field in table.schema:
        if pa.types.is_floating(field.type):
            columns[field.name] = pa.array([real] * len(table)).cast(field.type, safe=False)
        elif pa.types.is_integer(field.type):
            columns[field.name] = pa.array([integer] * len(table), type=field.type)
    return pa.table(columns, schema=table.schema)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["heads", "layers"])
@pytest.mark.parametrize(("what", "kind"), FORGERIES)
def test_whatever_a_table_holds_verify_goes_on_to_the_end_and_names_it(results, whole, what, kind, name):
    """The record is sealed again by somebody who knows how."""
    recipe, tables = (MERGE, MERGED) if name in MERGED else (DERIVE, DERIVED)
    provenance, paths = Provenance(recipe, "m", None), Results(str(results))
    forge(Path(paths.table(name, "m")), what, kind, dict(provenance.metadata()))
    seal_again(Path(paths.record(recipe.stage, "m")), [Path(paths.table(each, "m")) for each in tables], provenance)
    (results / "provenance" / "z.json").write_text("{")
    found = sentences(results)
    assert any("z.json" in sentence for sentence in found)
    new = [sentence for sentence in found if sentence.replace(str(results), "") not in whole and "z.json" not in sentence]
    assert new, found


#: Tables of other layers and heads than their model has.
PLACED: dict[str, Callable[[pa.Table], pa.Table]] = {
    "no rows": lambda table: table.slice(0, 0),
    "other layers and heads in each of many rows": lambda table: pa.table(
        {field.name: many(field, table[field.name][0].as_py()) for field in table.schema}, schema=table.schema
    ),
}


def many(field: pa.Field, value: Any) -> list[Any]:
    return list(range(3000)) if field.name in ("layer", "head", "layer_a", "layer_b", "index") else [value] * 3000


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["models", "heads", "layers", "gram", "overlap", "spectra"])
@pytest.mark.parametrize("kind", [*CONTENT, *PLACED])
def test_whatever_a_table_holds_what_is_shown_of_it_is_shown_or_refused_in_one_sentence(results, kind, name, monkeypatch):
    monkeypatch.chdir(results.parent)
    path = Path(Results(str(results)).table(name, "m"))
    write(path, (CONTENT | PLACED)[kind](read(path)), None)
    for command in ("show", "show m", "show m --head 0.0", "compare m m", "export --format netcdf"):
        error = CliRunner().invoke(app, [*command.split(), "--results", str(results)]).exception
        assert error is None or isinstance(error, HeadgramError), (command, error)


def test_an_error_that_no_damage_explains_stays_what_it_is(tmp_path):
    (tmp_path / "atlas").mkdir()
    (tmp_path / "atlas" / "notes.txt").touch()  # a stranger's file is no damage
    with pytest.raises(ZeroDivisionError), blamed_on_damage(tmp_path):
        _ = 1 / 0


#: What may stand in the place of directions, though it is a file that torch can read.
DIRECTIONS = {"a list": [1], "no circuit": {}, "no stack": {"qk": 1}, "no tensors": {"qk": {"qk": {"layers": 1}}}}


@pytest.mark.parametrize("what", ["table", "directions"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "loop", "folder", "gone", "garbage", *DIRECTIONS])
def test_what_cannot_be_read_of_an_atlas_is_one_sentence_that_names_it(request, results, what, kind):
    paths, atlas, start = Results(str(results)), open_atlas(results), time.monotonic()
    path = Path(paths.directions("m") if what == "directions" else paths.table("spectra", "m"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
        # Another process wakes whoever waits for it: a library may hold the interpreter meanwhile.
        waking = subprocess.Popen(["sh", "-c", 'while sleep 5; do : <> "$0"; done', path])
        request.addfinalizer(lambda: (waking.kill(), waking.wait()))
    elif kind == "folder":
        path.mkdir()
    elif kind in ("/dev/zero", "loop"):
        path.symlink_to(path.name if kind == "loop" else kind)
    elif kind in DIRECTIONS:
        torch.save(DIRECTIONS[kind], path)
    elif kind == "garbage":
        path.write_bytes(b"\xff" * 100)
    with pytest.raises(HeadgramError, match="cannot be read .*verify --repair") as caught:
        atlas.directions("m", "qk") if what == "directions" else atlas.table("spectra", "m")
    assert str(path) in str(caught.value)
    if what == "table":
        with pytest.raises(HeadgramError, match="spectra.parquet cannot be read"):  # not that what is written cannot be
            export_csv(atlas, ["m"], results.parent / "export")
    assert time.monotonic() - start < 5
