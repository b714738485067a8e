"""Results of one model that was never measured, and what `verify` says of them."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, settings

from headgram.atlas.verify import verify
from headgram.errors import HeadgramError
from headgram.results.paths import DERIVED, MERGED, Results
from headgram.results.record import Provenance, Recipe, parquet_metadata, seal
from headgram.results.tables import TABLES

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


def table_of(schema: pa.Schema) -> pa.Table:
    """One row."""
    columns = {field.name: pa.array(["qk" if field.type == pa.string() else 0]).cast(field.type) for field in schema}
    return pa.table(columns, schema=schema)


def write(path: Path, table: pa.Table, metadata: dict | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


MERGE, DERIVE = Recipe("merge", "{}", "f", "c"), Recipe("derive", "{}", "f", "c")


def made(results: Path) -> Path:
    paths = Results(str(results))
    for recipe, tables in ((MERGE, MERGED), (DERIVE, DERIVED)):
        provenance = Provenance(recipe, "m", None)
        data = [write(Path(paths.table(name, "m")), table_of(TABLES[name]), parquet_metadata(provenance)) for name in tables]
        seal_again(Path(paths.record(recipe.stage, "m")), data, provenance)
    return results


def seal_again(record: Path, data: list[Path], provenance: Provenance) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    seal(record, provenance, data)


def sentences(results: Path) -> list[str]:
    found = [finding.sentence for finding in verify(results)[1]]
    assert all(isinstance(sentence, str) and str(HeadgramError(sentence)).isprintable() for sentence in found)
    return found
