"""Tables in a terminal: those of one model fit into 80 columns, and no number is ever cut."""

import io

import pandas as pd
import pytest
from rich.console import Console

from headgram.atlas import display

LAYERS = ["layer", "symmetry_median", "layer_symmetry_score", "directionality_median", "layer_directionality"]
LAYERS += ["positive_energy_median", "stable_rank_median", "effective_rank_median", "cosine_next", "cosine_all"]
HEADS = ["layer", "head", "symmetry", "positive_energy", "directionality", "stable_rank", "effective_rank", "norm"]
COUPLINGS = ["layer_a", "layer_b", "head", "cosine", "z", "right", "left", "signed"]
MOVED = ["layer", "head", "cosine", "right", "left", "signed", "change", "floor", "symmetry_a", "symmetry_b", "norm_ratio"]


WHOLE = {"layer", "head", "layer_a", "layer_b"}
SMALL = {"stable_rank", "effective_rank", "norm", "change", "floor", "norm_ratio", "stable_rank_median", "effective_rank_median"}


def printed(columns: list[str], width: int) -> str:
    """A table whose numbers are as long as they get."""
    values = {name: [125, 7] if name in WHOLE else [1.234e-5, 999.9] if name in SMALL else [-0.765, 1] for name in columns}
    out = Console(width=width, file=io.StringIO(), emoji=False)
    display._print(out, "Numbers", pd.DataFrame(values), columns)
    return out.file.getvalue()


@pytest.mark.parametrize("columns", [LAYERS, HEADS, COUPLINGS], ids=["layers", "heads", "couplings"])
def test_tables_of_a_model_fit(columns):
    assert max(map(len, printed(columns, 80).splitlines())) <= 80


@pytest.mark.parametrize("width", [20, 80, 160])
@pytest.mark.parametrize("columns", [LAYERS, HEADS, COUPLINGS, MOVED], ids=["layers", "heads", "couplings", "moved"])
def test_no_number_is_cut(columns, width):
    numbers = [float(cell) for cell in printed(columns, width).rpartition("─")[2].split() if cell[-1].isdigit()]
    assert len(numbers) == 2 * len(columns)
    assert numbers.count(1.23e-5) == len(SMALL.intersection(columns))
    assert numbers.count(125) == len(WHOLE.intersection(columns))


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "a-model-whose-name-is-far-longer-than-any-table-is-wide"])
def test_names_are_folded_to_fit(name):
    facts = {"model": name, "circuit": "qk-folded", "stack": "self", "architecture": "llama"}
    rows = pd.DataFrame([facts | {"layers": 30, "heads": 9, "hidden": 576, "symmetry_median": 0.5, "cosine_adjacent": -0.1}])
    out = Console(width=80, file=io.StringIO(), emoji=False)
    display._print(out, "Models", rows, list(rows.columns))
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "".join(line.split()[0] for line in text.rpartition("─")[2].splitlines() if line.strip()).startswith(name[:40])


@pytest.mark.parametrize("name", ["copying", "departure", "score", "averaged", "writer"])
def test_a_value_that_is_not_there_is_a_dash(name):
    """As the eigenvalues of a composition between two streams."""
    out = Console(file=io.StringIO(), width=80)
    display._print(
        out, "Heads", pd.DataFrame({"layer": [0, 1], name: [None, "encoder" if name == "writer" else 0.25]}), ["layer", name]
    )
    first = next(line for line in out.file.getvalue().splitlines() if line.split()[:1] == ["0"])
    assert first.split() == ["0", "–"]
