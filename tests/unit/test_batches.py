"""Where the memory of a GPU runs out, half as many heads are measured at once, and the results are the same."""

import pytest
import torch

import headgram
from headgram.geometry import heads, pairs

WEIGHTS = torch.randn(3, 8, 4, 24, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("headgram.geometry.batches.ONE_BY_ONE", ())


def with_memory_for(monkeypatch, module, name: str, most: int, size) -> list[int]:
    """Let a function run out of memory where it is given more heads; the numbers of heads that it was given."""
    function, asked = getattr(module, name), []

    def limited(*arguments):
        asked.append(size(*arguments))
        if asked[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
        return function(*arguments)

    monkeypatch.setattr(module, name, limited)
    return asked


def test_spectra(monkeypatch, caplog):
    whole = headgram.spectrum(WEIGHTS[0], WEIGHTS[1, :2])
    asked = with_memory_for(monkeypatch, heads, "_measure_batch", 3, lambda q, *_: len(q))
    halved = headgram.spectrum(WEIGHTS[0], WEIGHTS[1, :2])
    assert asked == [8, 4, 2, 2, 2, 2]
    assert caplog.messages == [
        "headgram: memory ran out with 8 heads at once; going on with 4",
        "headgram: memory ran out with 4 heads at once; going on with 2",
    ]
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(halved, name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["auto", "float64"])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])  # also batches whose heads do not share their keys evenly
def test_inner_products(monkeypatch, caplog, precision, kv_heads):
    weights = (WEIGHTS, WEIGHTS[:, :kv_heads].flip(-1)) * 2
    whole = pairs.pair_products(*weights, precision)
    asked = with_memory_for(monkeypatch, pairs, "_multiply", 5, lambda sides, _: len(sides[0].q))
    halved = pairs.pair_products(*weights, precision)
    assert max(asked[1:]) == 4
    assert caplog.messages == ["headgram: memory ran out with 8 heads at once; going on with 4"]
    assert torch.equal(whole.exact, halved.exact)
    for name in ("gram", "transposed"):
        value = getattr(whole, name)
        torch.testing.assert_close(getattr(halved, name), value, rtol=1e-6, atol=1e-6 * float(value.abs().max()))


def test_where_one_head_is_too_much_it_is_said(monkeypatch):
    with_memory_for(monkeypatch, heads, "_measure_batch", 0, lambda q, *_: len(q))
    with pytest.raises(headgram.HeadgramError, match=r"Memory does not suffice for one head \(CUDA out of memory. Tried to all"):
        headgram.spectrum(WEIGHTS[0], WEIGHTS[1])
