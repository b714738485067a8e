"""The schemas of the tables, and Parquet written the same way every time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headgram.errors import HeadgramError
from headgram.forms.variants import Variant
from headgram.results.files import require_file, written_whole
from headgram.results.paths import Place
from headgram.results.record import Provenance, parquet_metadata

#: The measured scalars of a head: fields of `headgram.Spectrum`, columns of `heads`.
SCALARS = (
    "fro_sq",
    "trace",
    "self_overlap",
    "spectral_norm",
    "nuclear_norm",
    "stable_rank",
    "effective_rank",
    "symmetry",
    "positive_energy",
    "residual",
)

#: The scores of `headgram.geometry.scores`: of heads, in `heads`, and with the prefix `layer_` of whole layers, in `layers`.
SCORES = ("symmetry_score", "directionality")
LAYER_SCORES = tuple(f"layer_{name}" for name in SCORES)
#: Fields of `headgram.geometry.eigenvalues.Eigenvalues`. Empty but for heads of the circuit `ov` that write to the stream that
#: they read: elsewhere a head moves nothing, or moves it to where nothing is like it.
COPYING = ("copying", "positive", "departure", "trace_z")
#: All that is measured of a head in numbers.
HEAD_NUMBERS = (*SCALARS, *SCORES, *COPYING)
#: Sides of a head's directions.
SIDES = ("right", "left", "signed")
#: What changed of a head from one model to another: fields of `headgram.geometry.drift.Drift`, and what chance gives.
DRIFT_NUMBERS = (
    "cosine",
    "norm_before",
    "norm_after",
    "norm_ratio",
    "change_norm",
    "change",
    "change_rank",
    "inside_right",
    "inside_left",
    "inside",
    "inside_expected",
    "floor",
    "equal",
)
#: Of heads of `qk`, how much of a form turns with the offset, and how fast: fields of `headgram.geometry.frequencies.Turning`.
#: Empty where positions turn nothing; each but the first has a column `…_expected` beside it.
TURNS = tuple(f"rotary_{name}" for name in ("norm", "still", "wavelength", "sine", "speed", "beyond", "positional"))
#: Norms of the terms of a score that are linear in the query's token, or in the key's, over the form's; empty without biases.
LINEAR = ("linear_query", "linear_key")
#: Columns of `heads` that may be empty.
AT_TIMES = (*TURNS, *(f"{name}_expected" for name in TURNS[1:]), *LINEAR)
#: Columns of `heads` that `layers` and `models` summarise, and the page shows.
SUMMARISED = (*HEAD_NUMBERS, *TURNS, *LINEAR)
#: What `models` says of what stands around heads; empty where that is not known.
AROUND_MODELS = {"norm_kind": pa.string(), "score_scale": pa.float64(), "score_cap": pa.float64(), "not_folded": pa.string()}
#: What `layers` says of each number of its heads.
QUARTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75}

#: A table of measured numbers has no more values than this for every byte on disk. Only tables of equal values have, as of a
#: model of zeros.
_VALUES_PER_BYTE = 64
_FEW_VALUES = 2**26


_INT, _FLOAT, _SHORT, _TEXT = pa.int32(), pa.float64(), pa.float32(), pa.string()


def _schema(*columns: tuple[str, pa.DataType] | pa.Field) -> pa.Schema:
    return pa.schema([each if isinstance(each, pa.Field) else pa.field(*each, nullable=False) for each in columns])


def _each(kind: pa.DataType, *names: str) -> list[tuple[str, pa.DataType]]:
    """Columns of one type."""
    return [(name, kind) for name in names]


def _nullable(*names: str) -> list[pa.Field]:
    """Columns of numbers that may be null."""
    return [pa.field(name, pa.float64()) for name in names]


def _number(name: str, suffix: str = "") -> pa.Field:
    return pa.field(f"{name}{suffix}", pa.float64(), nullable=name in (*COPYING, *TURNS, *LINEAR))


_PLACE = (("circuit", _TEXT), ("stack", _TEXT))
_HEAD = (*_PLACE, *_each(_INT, "layer", "head"))
#: What a form's factors are, `raw` or `folded`, and at which offset of query and key, as the name in `circuit` says it too.
_FORM = (("norms", _TEXT), ("offset", _INT))
#: The columns that say which heads a row is about, in which form.
WHERE = ("circuit", "stack", "norms", "offset")

# The column `model` is the partition of the atlas, so no file repeats it.
HEADS = _schema(
    *_PLACE,
    *_FORM,
    *_each(_INT, "layer", "head", "kv_head", "rank", "hidden"),
    *map(_number, HEAD_NUMBERS),
    *_nullable(*AT_TIMES),
)
SPECTRA = _schema(
    *_PLACE,
    *_FORM,
    *_each(_INT, "layer", "head", "index"),
    *_each(_FLOAT, "singular_value", "symmetric_eigenvalue"),
    *_nullable("eigenvalue_real", "eigenvalue_imaginary"),  # null where COPYING is
)
GRAM = _schema(
    *_PLACE,
    *_FORM,
    *_each(_INT, "layer_a", "layer_b", "head"),
    *_each(_FLOAT, "gram", "cosine", "transposed", "symmetric", "antisymmetric", "z"),
)
PAIRS = _schema(
    *_PLACE,
    *_FORM,
    *_each(_INT, "layer_a", "head_a", "layer_b", "head_b"),
    ("shared", pa.bool_()),
    *_each(_SHORT, "cosine", "transposed"),
)
OVERLAP = _schema(
    *_PLACE,
    *_FORM,
    *_each(_INT, "layer_a", "layer_b", "head"),
    *_each(_FLOAT, *SIDES, "expected"),
)
LAYERS = _schema(
    *_PLACE,
    *_FORM,
    ("layer", _INT),
    *(_number(name, f"_{label}") for name in SUMMARISED for label in QUARTILES),
    *_each(_FLOAT, "cosine_previous", "cosine_next", "cosine_all", *LAYER_SCORES),
)
MODELS = _schema(
    *_PLACE,
    *_FORM,
    *_each(_TEXT, "architecture", "stored_dtype", "lineage"),
    pa.field("step", _FLOAT),  # null where the manifest gives none
    ("labels", _TEXT),
    *_each(_INT, "layers", "heads", "kv_heads", "rank", "hidden", "directions"),
    *(_number(name, "_median") for name in (*SUMMARISED, *LAYER_SCORES)),
    *_each(_FLOAT, "cosine_adjacent", "cosine_all"),
    *((f"overlap_{name}", _FLOAT) for name in (*(f"{side}_adjacent" for side in SIDES), "expected")),
    *(pa.field(name, kind) for name, kind in AROUND_MODELS.items()),
)
NEIGHBOURS = _schema(
    *_PLACE,
    *_FORM,
    *_each(_INT, "layer", "head"),
    ("measure", _TEXT),
    *_each(_INT, "place", "other_layer", "other_head"),
    ("same_layer", pa.bool_()),
    *_each(_FLOAT, "value", "chance", "deviations"),
)
# The column `other`, the earlier of the two models, is the second partition of what follows.
DRIFT = _schema(
    *_HEAD,
    *_each(_FLOAT, *DRIFT_NUMBERS, *SIDES, "expected"),
)
CHANGES = _schema(
    *_PLACE,
    *_each(_INT, "layer", "head", "index"),
    ("singular_value", _FLOAT),
)
MATCHES = _schema(
    *_PLACE,
    ("among", _TEXT),
    *_each(_INT, "layer", "head", "other_layer", "other_head"),
    *_each(_FLOAT, "cosine", "margin", "chance"),
    ("mutual", pa.bool_()),
)
ROTARY = _schema(
    *_PLACE,
    *_each(_INT, "layer", "head", "offset"),
    *_each(_FLOAT, "norm", "cosine", "transposed", "symmetry", "trace", "expected"),
)
FREQUENCIES = _schema(
    *_HEAD,
    pa.field("plane", _INT),  # null, as what follows, of the rows that no rotation touches
    *_nullable("wavelength"),
    *_each(_FLOAT, "energy", "share", "expected"),
    *_nullable("cosine_norm", "sine_norm"),
)
#: What `heads` takes from the stage `rotary`.
TURNING = _schema(
    *_HEAD,
    *_nullable(*AT_TIMES),
)
_COMPOSED = (
    *_each(_TEXT, "stack", "kind", "writer"),
    *_each(_INT, "layer_a", "head_a", "layer_b", "head_b"),
)
COMPOSITION = _schema(
    *_COMPOSED,
    *_each(_SHORT, "score", "times_chance", "z", "acausal"),
    ("later", _INT),
    pa.field("averaged", _SHORT),  # null where positions do not turn what is read, or it is not known how
    ("folded", pa.bool_()),
)
KERNELS = _schema(
    ("stack", _TEXT),
    ("role_a", _TEXT),
    *_each(_INT, "layer_a", "head_a"),
    ("role_b", _TEXT),
    *_each(_INT, "layer_b", "head_b"),
    *_each(_SHORT, "kernel", "expected", "z"),
    ("folded", pa.bool_()),
)
CHANNELS = _schema(
    *_COMPOSED,
    ("place", _INT),
    ("score", _SHORT),
    *_each(_FLOAT, "first", "effective_rank"),
    *_nullable("copying", "positive", "departure"),  # null between two streams
)
TOKENS = _schema(
    *_HEAD,
    ("side", _TEXT),
    *_each(_INT, "direction", "sign", "place", "token"),
    ("text", _TEXT),
    *_each(_SHORT, "value", "deviations", "chance", "share"),
    ("folded", pa.bool_()),
)
TOKEN_PATHS = _schema(
    *_each(_TEXT, "stack", "path"),
    *(pa.field(name, _INT) for name in ("layer_a", "head_a")),  # null but where one head feeds another
    *_each(_INT, "layer", "head"),
    *_each(_FLOAT, *COPYING),
    ("folded", pa.bool_()),
)
#: Every table of the atlas, by name.
TABLES = {
    "heads": HEADS,
    "spectra": SPECTRA,
    "gram": GRAM,
    "pairs": PAIRS,
    "overlap": OVERLAP,
    "neighbours": NEIGHBOURS,
    "layers": LAYERS,
    "models": MODELS,
    "drift": DRIFT,
    "changes": CHANGES,
    "matches": MATCHES,
    "composition": COMPOSITION,
    "channels": CHANNELS,
    "kernels": KERNELS,
    "tokens": TOKENS,
    "token_paths": TOKEN_PATHS,
    "rotary": ROTARY,
    "frequencies": FREQUENCIES,
}


def labelled(table: pa.Table, schema: pa.Schema, **labels: str | int) -> pa.Table:
    """Rows with some texts or numbers in common, each of which becomes a column; with the columns of a schema, in its order."""
    rows = pa.array(np.zeros(len(table), dtype=np.int32))
    for name, value in labels.items():
        table = table.append_column(name, pa.array([value]).take(rows))
    return table.select(schema.names).cast(schema)


def at_place(place: Place, table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows about the heads of one place, with the columns that say so, as a schema has it."""
    circuit, stack = place
    form = Variant.of(circuit)
    return labelled(table, schema, circuit=circuit, stack=stack, norms=form.norm, offset=form.offset)


def of_place(place: Place, table: pa.Table) -> pa.Table:
    """The rows of a table that are about the heads of one place."""
    return table.filter((pc.field("circuit") == place[0]) & (pc.field("stack") == place[1]))


def write_table(path: Path, parts: Iterable[pa.Table], provenance: Provenance, compression: str = "zstd") -> None:
    """Write the parts of a table below one another, each as row groups of its own; equal parts and provenance give equal bytes.

    A part is written before the next one is asked for, so that a table may be larger than memory. Columns of float32, as of the
    largest tables, hold hardly two equal values: their bytes are stored in planes, which takes two thirds of the room.
    """
    rest = iter(parts)
    part = next(rest)
    schema = part.schema.with_metadata(parquet_metadata(provenance))
    split = [field.name for field in schema if field.type == "float"]
    options = {
        "compression": compression,
        "write_page_checksum": True,
        "use_dictionary": [name for name in schema.names if name not in split],
        "use_byte_stream_split": split,
    }
    with written_whole(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for each in itertools.chain([part], rest):
            writer.write_table(each.cast(schema))


def read_table(path: Path) -> pa.Table:
    """Read one Parquet file and verify its pages; the names of its folders add no columns.

    Raises
    ------
    HeadgramError
        If it claims many more values than its bytes can hold: a few bytes may stand for billions of equal ones.
    """
    with _checked(path) as file:
        return file.read()


@contextlib.contextmanager
def _checked(path: Path) -> Iterator[pq.ParquetFile]:
    """An open Parquet file that claims no more values than its bytes can hold; pages are verified as they are read."""
    require_file(path)
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        metadata = file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        values = sum(group.column(j).num_values for group in groups for j in range(group.num_columns))
        if max(values, metadata.num_rows) > max(_FEW_VALUES, _VALUES_PER_BYTE * path.stat().st_size):
            raise HeadgramError(f"{path} claims {values} values, which no table of its size holds: delete it and run again")
        yield file


def read_parts(path: Path, **labels: str) -> Iterator[pa.Table]:
    """The row groups of a Parquet file, one after the other, as `write_table` was given them; checked as by `read_table`.

    Of those with some texts in common, given by column, only the rows that have them: other groups are not decoded.
    """
    with _checked(path) as file:
        for i in range(file.num_row_groups):
            if _may_hold(file.metadata.row_group(i), labels):
                part = file.read_row_group(i)
                for name, value in labels.items():
                    part = part.filter(pc.field(name) == value)
                yield part


def _may_hold(group: pq.RowGroupMetaData, labels: Mapping[str, str]) -> bool:
    """Whether the statistics of a row group leave it open that it has rows with these texts."""
    columns = {(column := group.column(i)).path_in_schema: column.statistics for i in range(group.num_columns)}
    known = {name: columns[name] for name in labels if columns[name] is not None and columns[name].has_min_max}
    return all(each.min <= labels[name] <= each.max for name, each in known.items())


def square(gram: pa.Table, column: str, layers: np.ndarray, heads: int) -> np.ndarray:
    """A column of a stack's rows of the table `gram` as (L, L, H), both triangles.

    Parameters
    ----------
    layers : (L,)
        True indices, ascending.
    """
    values = np.zeros((len(layers), len(layers), heads))
    a, b = (np.searchsorted(layers, gram[name].to_numpy()) for name in ("layer_a", "layer_b"))
    head = gram["head"].to_numpy()
    values[a, b, head] = values[b, a, head] = gram[column].to_numpy()
    return values


def pair_indices(pairs: pa.Table, layers: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Where both heads of each pair stand among all heads of a stack, which lie layer by layer.

    Parameters
    ----------
    layers : (L,)
        True indices, ascending.
    """
    a, b = (
        np.searchsorted(layers, pairs[f"layer_{side}"].to_numpy()) * heads + pairs[f"head_{side}"].to_numpy() for side in "ab"
    )
    return a, b
