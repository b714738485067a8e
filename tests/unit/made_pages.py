"""Tables, models and pages that are made up."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headgram.report.arrays import StackArrays, StackSummary
from headgram.report.columns import columns
from headgram.report.matrix import PairMatrix


def place_of(found, picture: str, **row) -> tuple[float, float]:
    """Where in the window a row's mark is drawn; of a line, one of its points."""
    return tuple(
        found.page.evaluate(
            """([id, row]) => {
            const place = document.getElementById(id), view = headgram.view(id), marks = [];
            place.scrollIntoView({ block: "center" });
            const visit = item => {
                if (item.items) item.items.forEach(visit);
                else if (item.datum && item.mark.role === "mark") marks.push(item);
            };
            visit(view.scenegraph().root);
            const fits = ({ datum }) => Object.entries(row).every(([name, value]) => datum[name] === value);
            const { x, y, width = 0, height = 0 } = marks.find(fits);
            const box = place.getBoundingClientRect(), [left, top] = view.origin(), padding = view.padding();
            return [box.left + left + padding.left + x + width / 2, box.top + top + padding.top + y + height / 2];
        }""",
            [picture, row],
        )
    )


def table_of(schema, rows: dict, path):
    """A table of some rows, with random numbers in all other columns."""
    random = np.random.default_rng(len(str(path)))
    count = len(rows["layer"])
    texts = {"circuit": "qk", "stack": "self"}
    made = {
        field.name: np.full(count, texts[field.name]) if field.name in texts else random.random(count).round() for field in schema
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(made | rows).cast(schema), path)
    return path


def stack(layers: int, heads: int, rank: int, seed=0, facts=None) -> StackArrays:
    """A stack of random numbers."""
    random = np.random.default_rng(seed)
    pairs = layers * (layers + 1) // 2
    known = {"architecture": "llama", "stored_dtype": "BF16", "layers": layers, "heads": heads, "kv_heads": heads, "rank": rank}
    neighbours = np.stack(np.broadcast_arrays(1, 2, random.random((layers, heads, 8)))).astype(float)
    return StackArrays(
        summary=StackSummary(
            facts=known | {"hidden": 4 * rank, "directions": 8} | (facts or {}),
            layers=np.arange(layers),
            quartiles=np.sort(random.random((3, len(columns()), layers)), axis=0),
        ),
        heads=random.random((len(columns()), layers, heads)),
        singular=-np.sort(-random.random((layers, heads, rank))),
        eigenvalues=-np.sort(-random.standard_normal((layers, heads, 2 * rank))),
        pairs={
            kind: random.random((pairs, heads))
            for kind in ("cosine", "transposed", "symmetric", "antisymmetric", "right", "left", "signed")
        },
        neighbours=dict.fromkeys(("cosine", "transposed", "right", "left", "signed"), neighbours),
        matrix=None,
        expected=np.full((len(columns()), layers), np.nan),
    )


def matrix_of(layers: int, heads: int, seed=0) -> PairMatrix:
    """Cosines as of random forms, but for a few pairs that are alike; the heads in an order of their own."""
    random = np.random.default_rng(seed)
    values = {}
    for name in ("cosine", "transposed"):
        square = random.standard_normal((layers * heads,) * 2).astype(np.float32) / 100
        square = (square + square.T) / 2
        square[3, 17] = square[17, 3] = -0.8
        values[name] = square
    return PairMatrix(values, random.permutation(layers * heads), heads)
