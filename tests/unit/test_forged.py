"""Locks, records, tables and lists that somebody forged are refused or named, whatever they hold."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from locked import locked_llama
from typer.testing import CliRunner

from headgram.atlas.export import export_csv
from headgram.atlas.reader import open_atlas
from headgram.atlas.repair import repair
from headgram.atlas.verify import blamed_on_damage, verify
from headgram.cli import app
from headgram.errors import HeadgramError, UnknownTypeError
from headgram.foreign import parse_json
from headgram.results.asked import ask_for, asked_for, given_to
from headgram.results.claims import Writing, claim, claimed, settle
from headgram.results.paths import DERIVED, MERGED, Results
from headgram.results.record import Identity, Provenance, _sealed_text, canonical, is_fresh, parquet_metadata, read_record, seal
from headgram.results.tables import TABLES
from headgram.run.startup import _read_sightings, asked_by_study
from headgram.study.lock import Lock, lock_path, missing_rows, read_lock, write_lock
from headgram.study.manifest import read_manifest
from headgram.study.options import Config, read_options
from headgram.study.plan import make_plan

SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"
PER_CASE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

#: What may stand in the place of anything in JSON.
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 2**63, 10**400, -(10**400), "", "12", "../../x", "/etc/passwd", "a\0b", "\x1b[2J",
    "x" * 10**5, [], {}, [[]],    [None], ["x"], [1, 1], [10**400], {"": {}}, {"../x": 1}, {"a": [1]}, [[[[[[]]]]]] * 9,
]  # fmt: skip


def places(value: Any, above: tuple = ()) -> Iterator[tuple]:
    """The way to every value in JSON."""
    yield above
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*above, key))


def changed(value: Any, place: tuple, change: Any) -> Any:
    """JSON with another value at a place; where `change` is Ellipsis, with none."""
    if not place:
        return change
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if change is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = change
    return value


# ---- the lock


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


# ---- a results folder of one model, with tables of one row


def table_of(schema: pa.Schema) -> pa.Table:
    """One row."""
    columns = {field.name: pa.array(["qk" if field.type == pa.string() else 0]).cast(field.type) for field in schema}
    return pa.table(columns, schema=schema)


def write(path: Path, table: pa.Table, metadata: dict | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


MERGE, DERIVE = Identity("merge", "{}", "f", "c"), Identity("derive", "{}", "f", "c")


@pytest.fixture
def results(tmp_path) -> Path:
    return made(tmp_path / "results")


def made(results: Path) -> Path:
    paths = Results(str(results))
    for identity, tables in ((MERGE, MERGED), (DERIVE, DERIVED)):
        provenance = Provenance(identity, "m", None)
        data = [write(Path(paths.table(name, "m")), table_of(TABLES[name]), parquet_metadata(provenance)) for name in tables]
        seal_again(Path(paths.record(identity.stage, "m")), data, provenance)
    return results


def seal_again(record: Path, data: list[Path], provenance: Provenance) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    seal(record, provenance, data)


def sentences(results: Path) -> list[str]:
    found = [finding.sentence for finding in verify(results)[1]]
    assert all(isinstance(sentence, str) and str(HeadgramError(sentence)).isprintable() for sentence in found)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[str]:
    """What verify says of the tables of one row as they are: their numbers are made up."""
    results = made(tmp_path_factory.mktemp("whole") / "results")
    return [sentence.replace(str(results), "") for sentence in sentences(results)]


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


# ---- files of strangers


def asked(results: Path) -> dict[str, str]:
    """The keys of what `made` made, as a run asks for them."""
    ask_for(results, {"provenance/m.json": MERGE.key, "provenance/derived/m.json": DERIVE.key})
    return asked_for(results) or {}


@pytest.mark.parametrize("text", ["notes", "[]", "{}", '{"files": {"../heads.parquet": 3}}', "[" * 10**5])
@pytest.mark.parametrize("place", ["provenance/mine.json", "report/data/mine.json", "models/m/a/mine.json", "atlas/notes.txt"])
def test_a_file_that_no_run_wrote_is_called_that_and_stays(results, whole, place, text):
    path, keys = results / place, asked(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (found,) = [finding for finding in verify(results)[1] if path.name in finding.sentence]
    assert "belongs to no finished artifact" in found.sentence
    assert f"move it out of {results / place.split('/')[0]}" in found.sentence
    assert found in repair(results, [found], keys)
    assert path.read_text() == text
    path.rename(results / path.name)  # what the sentence says
    assert [sentence.replace(str(results), "") for sentence in sentences(results)] == whole


def test_what_a_run_wrote_and_nobody_asks_for_is_removed_by_a_repair(results, whole):
    path, keys = results / "provenance" / "old.json", asked(results)
    claim(results, [Writing(path, [path])])
    path.write_text("{")
    (found,) = [finding for finding in verify(results)[1] if path.name in finding.sentence]
    assert repair(results, [found], keys) == []
    assert [sentence.replace(str(results), "") for sentence in sentences(results)] == whole


def test_a_record_that_nobody_asks_for_has_no_file_removed_of_which_it_tells_nothing_true(results):
    """Whatever it names: what lies there is another's."""
    notes, keys = results / "atlas" / "notes.txt", asked(results)
    notes.write_text("mine")
    forged = results / "provenance" / "forged.json"
    seal_again(forged, [notes, Path(Results(str(results)).table("heads", "m"))], Provenance(MERGE, "m", None))
    notes.write_text("more")
    found = [finding for finding in verify(results)[1] if "notes.txt" in finding.sentence]
    repair(results, found, keys)
    assert notes.read_text() == "more"


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


def read(path: Path) -> pa.Table:
    return pq.read_table(path.open("rb"))


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
    identity, tables = (MERGE, MERGED) if name in MERGED else (DERIVE, DERIVED)
    provenance, paths = Provenance(identity, "m", None), Results(str(results))
    forge(Path(paths.table(name, "m")), what, kind, dict(provenance.metadata()))
    seal_again(Path(paths.record(identity.stage, "m")), [Path(paths.table(each, "m")) for each in tables], provenance)
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


# ---- what is no file, at each level


PLACES = [
    "atlas", "atlas/heads", "atlas/heads/model=m", "atlas/heads/model=m/heads.parquet", "atlas/new",
    "provenance", "provenance/m.json", "provenance/new.json", "models", "report", "report/data",
]  # fmt: skip


def deep(path: Path) -> None:
    """Folders in one another, so many that no path leads to the last."""
    with contextlib.chdir(path.parent):
        for _ in range(1500):
            os.mkdir(path.name)  # noqa: PTH102
            os.chdir(path.name)


ODDITIES: dict[str, Callable[[Path], None]] = {
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to what no file system holds": lambda path: path.symlink_to("x" * 300),
    "a link to nothing": lambda path: path.symlink_to("/nowhere"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link upwards": lambda path: path.symlink_to(".."),
    "a pipe": os.mkfifo,
    "deep folders": deep,
}


@pytest.mark.parametrize("kind", ODDITIES)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_lies_in_a_results_folder_it_is_named_and_nothing_ends_early(results, place, kind):
    path = results / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    (results / "seed").mkdir()
    (results / "seed" / "mine").touch()
    ODDITIES[kind](path)
    found = verify(results)[1]
    said = " ".join(finding.sentence for finding in found)
    assert "seed/mine belongs to no finished artifact" in said
    assert place in said or kind == "deep folders"
    repair(results, found, {})
    with contextlib.suppress(HeadgramError):
        claim(results, [Writing(results / "provenance" / "m.json", [results / name for name in PLACES if "." in name])])
    settle(results)
    with contextlib.suppress(HeadgramError):
        open_atlas(results).table("heads")
    assert (results / "seed" / "mine").exists()
    if kind == "deep folders":
        subprocess.run(["rm", "-r", str(path)], check=True)  # which pytest could not


# ---- files without end


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


def test_a_results_folder_that_is_a_link_to_itself_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").symlink_to("results")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "models.tsv").write_text("name\tsource\nm\tmodels/m\n")
    write_lock(lock_path(tmp_path / "config" / "models.tsv"), {"m": locked_llama()})
    asked_by_study(Path("results"))
    with pytest.raises(HeadgramError, match="holds no artifact to verify"):
        verify(Path("results"))


def test_folders_without_end_are_walked_through_and_what_lies_beyond_a_path_is_passed_over(results, whole, monkeypatch):
    """Folders in folders, deeper than Python recurses and than a path may be long."""
    for level in range(3000):
        if level == 0:
            monkeypatch.chdir(results / "atlas")
        Path("a").mkdir()
        os.chdir("a")
        if level in (10, 1500):
            Path("notes.txt").touch()
    monkeypatch.chdir(results.parent)
    try:
        found = [sentence.replace(str(results), "") for sentence in sentences(results)]
        assert sum("notes.txt belongs to no finished artifact" in sentence for sentence in found) == 2
        assert [sentence for sentence in found if "notes.txt" not in sentence] == whole
    finally:
        subprocess.run(["rm", "-r", results], check=True)  # which pytest could not
