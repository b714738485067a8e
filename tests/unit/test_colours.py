"""Colours of charts and figures: noise is pale in every one, and every bar marks chance where the colours have it."""

import numpy as np
import pytest

from headgram.report.chance import nulls
from headgram.report.colours import above, around, spread, times_chance

LAYERS, HEADS = 80, 64
FACTS = {"hidden": 8192, "directions": 8, "layers": LAYERS, "heads": HEADS}


def marked(colours, name="chance"):
    return [value for value, text in colours.marks if text == name]


@pytest.mark.parametrize("column", ["symmetry", "symmetry_score", "cosine", "transposed", "symmetric", "right"])
@pytest.mark.parametrize("of_mean", [False, True], ids=["heads", "means"])
def test_a_random_model_is_pale_and_chance_is_marked(column, of_mean):
    null = nulls(FACTS)[column].mean_of(HEADS if of_mean else 1)
    count = LAYERS * (LAYERS - 1) // 2 if of_mean else LAYERS * HEADS
    values = null.mean + null.deviation * np.random.default_rng(0).standard_normal(count)
    if column == "right":
        colours = above(float(values.max()), null, count)
        assert marked(colours) == [null.mean]
        assert values.max() < colours.domain[1] / 2
    else:
        colours = around(null.mean, float(np.abs(values - null.mean).max()), null, count)
        reach = colours.domain[1] - null.mean
        assert (np.abs(values - null.mean) < reach / 2).all()
        low, high = marked(colours)
        assert low < np.quantile(values, 0.01) < np.quantile(values, 0.99) < high


@pytest.mark.parametrize("largest", [0.0, 1e-9, 1e-3, 0.5, 1.0])
@pytest.mark.parametrize("column", ["symmetry", "cosine", "right"])
@pytest.mark.parametrize("width", [1, 2, 8, 16, 8192])
def test_marks_lie_in_the_colours_and_apart(largest, column, width):
    null = nulls(FACTS | {"hidden": width, "directions": min(8, width)})[column]
    found = [above(largest, null, 9), spread((0.0, largest), null.mean), spread((largest, largest)), times_chance(10 * largest)]
    found += [around(null.mean, largest, null, 9), around(0.5, largest)]
    for colours in found:
        low, high = colours.domain
        values = sorted(value for value, _ in colours.marks)
        assert low < high
        assert low <= values[0]
        assert values[-1] <= high
        # A null that is close to 0 lies at the beginning of its colours, and the next mark is far away.
        assert (np.diff(values) > 0.14 * (high - low)).all()


@pytest.mark.parametrize(("ends", "chance"), [((0.0, 1.0), 0.5), ((0.0, 1.0), 2.0), ((0.0, 1.0), -1.0), ((3.0, 3.0), 3.0)])
def test_what_chance_gives_is_among_the_colours(ends, chance):
    colours = spread(ends, chance)
    assert marked(colours) == [chance]
    assert colours.domain[0] <= min(*ends, chance)
    assert max(*ends, chance) <= colours.domain[1]
