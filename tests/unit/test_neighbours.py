"""Nearest heads against forms that are built and compared one by one."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headgram
from headgram.geometry.neighbours import MEASURES, nearest_heads


def directions(layers: int, heads: int, rank: int, hidden: int, k: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    w_q, w_k = (torch.randn(layers, heads, rank, hidden, generator=generator, dtype=torch.float64) for _ in range(2))
    w_q[0, 0] = 0
    found = [headgram.spectrum(q, k_, topk=k) for q, k_ in zip(w_q, w_k, strict=True)]
    values = torch.stack([each.singular_values[:, :k] for each in found])
    return values, *(torch.stack([getattr(each, name) for each in found]) for name in ("right", "left", "signed"))


def definition(measure, values, right, left, signed, a, b) -> float:
    if measure == "form":
        parts = [np.einsum("i,ix,iy->xy", values[x], left[x], right[x]) for x in (a, b)]
        norms = np.prod([np.linalg.norm(part) for part in parts])
        return float((parts[0] * parts[1]).sum() / norms) if norms else 0.0
    rows = {"right": right, "left": left, "signed": signed}[measure]
    return float(((rows[a] @ rows[b].T) ** 2).sum() / len(rows[a]))


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(0, 99))
def test_the_nearest_heads_are_those_of_the_definition(layers, heads, rank, count, seed):
    tensors = directions(layers, heads, rank, 10, min(3, rank), seed)
    arrays = [tensor.numpy() for tensor in tensors]
    found = nearest_heads(*tensors, count=count)
    assert tuple(found) == MEASURES
    every = list(itertools.product(range(layers), range(heads)))
    for measure, a in itertools.product(MEASURES, every):
        expected = {b: definition(measure, *arrays, a, b) for b in every if b[0] != a[0]}
        best = sorted((abs(value) for value in expected.values()), reverse=True)[:count]
        layer, head, value = (getattr(found[measure], name)[a].tolist() for name in ("layer", "head", "value"))
        np.testing.assert_allclose(np.abs(value), best, atol=1e-5)
        np.testing.assert_allclose(value, [expected[b] for b in zip(layer, head, strict=True)], atol=1e-5)
        assert len(set(zip(layer, head, strict=True))) == len(layer)


def test_equally_near_heads_are_in_the_order_of_layers():
    values, right, left, signed = (each[:1].repeat(4, *[1] * (each.ndim - 1)) for each in directions(1, 2, 3, 12, 3, 5))
    found = nearest_heads(values, right, left, signed, count=3)["form"]
    assert found.layer[1, 1].tolist() == [0, 2, 3]
    assert found.head[1, 1].tolist() == [1, 1, 1]
    torch.testing.assert_close(found.value[1, 1], torch.ones(3))
