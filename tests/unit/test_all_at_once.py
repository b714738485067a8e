"""Where the memory of a GPU runs out, half as many heads are measured at once, and the results are the same."""

import pytest
import torch

import headgram
from headgram.forms.circuits import qk
from headgram.geometry import inner, spectra

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
WEIGHTS = torch.randn(3, 8, 4, 24, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("headgram.geometry.blocks.ONE_BY_ONE", ())


def with_memory_for(monkeypatch, module, name: str, most: int, size, error=OUT_OF_MEMORY) -> list[int]:
    """Let a function run out of memory where it is given more heads; the numbers of heads that it was given."""
    function, asked = getattr(module, name), []

    def limited(*arguments):
        asked.append(size(*arguments))
        if asked[-1] > most:
            raise error
        return function(*arguments)

    monkeypatch.setattr(module, name, limited)
    return asked


def test_spectra(monkeypatch, caplog):
    whole = headgram.spectrum(WEIGHTS[0], WEIGHTS[1, :2])
    asked = with_memory_for(monkeypatch, spectra, "_measure_block", 3, lambda q, *_: len(q))
    halved = headgram.spectrum(WEIGHTS[0], WEIGHTS[1, :2])
    assert asked == [8, 8, 4, 4, 2, 2, 2, 2]  # each once more after memory was given back
    assert caplog.messages == [
        "headgram: memory ran out with 8 heads at once; going on with 4",
        "headgram: memory ran out with 4 heads at once; going on with 2",
    ]
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(halved, name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["auto", "float64"])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])  # also batches whose heads do not share their keys evenly
@pytest.mark.parametrize("same", [True, False])
def test_inner_products(monkeypatch, caplog, precision, kv_heads, same):
    one = qk(WEIGHTS[0], WEIGHTS[0, :kv_heads].flip(-1))
    other = one if same else qk(WEIGHTS[1], WEIGHTS[1, :kv_heads])
    whole = inner.inner_products(one, other, precision)
    asked = with_memory_for(monkeypatch, inner, "_multiplied", 5, lambda x, *_: len(x))
    halved = inner.inner_products(one, other, precision)
    assert asked[:2] == [8, 8]
    assert max(asked[2:]) == 4
    assert caplog.messages == ["headgram: memory ran out with 8 heads at once; going on with 4"]
    assert torch.equal(whole.exact_x, halved.exact_x)
    assert torch.equal(whole.exact_y, halved.exact_y)
    for name in ("gram", "transposed"):
        value = getattr(whole, name)
        torch.testing.assert_close(getattr(halved, name), value, rtol=1e-6, atol=1e-6 * float(value.abs().max()))


def test_where_one_head_is_too_much_it_is_said(monkeypatch):
    with_memory_for(monkeypatch, spectra, "_measure_block", 0, lambda q, *_: len(q))
    with pytest.raises(
        headgram.HeadgramError, match=r"There is too little memory for one head \(CUDA out of memory. Tried to all"
    ):
        headgram.spectrum(WEIGHTS[0], WEIGHTS[1])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Out of memory allocating 4,096 bytes"),  # CuPy's
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_other_libraries_say_it_otherwise(monkeypatch, error):
    asked = with_memory_for(monkeypatch, spectra, "_measure_block", 4, lambda q, *_: len(q), error)
    headgram.spectrum(WEIGHTS[0], WEIGHTS[1])
    assert asked == [8, 8, 4, 4]


def test_what_fits_once_memory_was_given_back_is_not_halved(monkeypatch, caplog):
    left = iter([0])
    asked = with_memory_for(monkeypatch, spectra, "_measure_block", 7, lambda q, *_: len(q) - next(left, 1))
    headgram.spectrum(WEIGHTS[0], WEIGHTS[1])
    assert asked == [8, 7]
    assert not caplog.messages


def test_other_errors_are_not_taken_for_it(monkeypatch):
    with_memory_for(monkeypatch, spectra, "_measure_block", 0, lambda q, *_: len(q), RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        headgram.spectrum(WEIGHTS[0], WEIGHTS[1])
