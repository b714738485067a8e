"""The schemas of the tables, and Parquet written the same way every time."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headgram.artifacts import Provenance, parquet_metadata, written_whole

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


def _schema(*columns: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


# The column `model` is the partition of the atlas, so no file repeats it.
HEADS = _schema(
    ("stack", pa.string()),
    *((name, pa.int32()) for name in ("layer", "head", "kv_head", "rank", "hidden")),
    *((name, pa.float64()) for name in SCALARS),
)
SPECTRA = _schema(
    ("stack", pa.string()),
    *((name, pa.int32()) for name in ("layer", "head", "index")),
    ("singular_value", pa.float64()),
    ("symmetric_eigenvalue", pa.float64()),
)
GRAM = _schema(
    ("stack", pa.string()),
    *((name, pa.int32()) for name in ("layer_a", "layer_b", "head")),
    ("gram", pa.float64()),
    ("cosine", pa.float64()),
)


def write_table(path: Path, table: pa.Table, provenance: Provenance, compression: str = "zstd") -> None:
    """Write a table whole; equal tables of equal provenance give equal bytes."""
    table = table.replace_schema_metadata(parquet_metadata(provenance))
    with written_whole(path) as file:
        pq.write_table(table, file, compression=compression, write_page_checksum=True)


def read_table(path: Path) -> pa.Table:
    """Read one Parquet file and verify its pages; the names of its folders add no columns."""
    with path.open("rb") as file:
        return pq.read_table(file, page_checksum_verification=True)
