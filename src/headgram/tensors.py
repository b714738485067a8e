"""The arithmetic for those who hold tensors: `headgram.spectrum` and `headgram.gram`."""

from __future__ import annotations

from numbers import Integral
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError, require
from headgram.forms.circuits import qk
from headgram.geometry.checks import check_weights
from headgram.geometry.inner import Precision
from headgram.geometry.same_index import same_index_products
from headgram.geometry.spectra import Spectrum, spectra

Weights = Tensor | np.ndarray


def spectrum(w_q: Float[Weights, "heads rank hidden"], w_k: Float[Weights, "kv_heads rank hidden"], topk: int = 8) -> Spectrum:
    """Measure every head of one layer, `g = W_K^T W_Q`.

    Parameters
    ----------
    w_q : (H, r, d)
        Query weights, a torch tensor or a NumPy array, any floating dtype, any device: `q = W_Q x`.
    w_k : (K, r, d)
        Key weights; query head `h` reads key head `h * K // H`.
    topk
        Directions to keep.

    Returns
    -------
    Spectrum
        Values, directions and scalars of every head, float64, on the device of the weights.

    Raises
    ------
    HeadgramError
        If the shapes do not fit together, a weight is not finite, or a norm overflows float64.

    Examples
    --------
    >>> import headgram, torch
    >>> result = headgram.spectrum(torch.randn(4, 8, 64), torch.randn(2, 8, 64), topk=3)
    >>> result.singular_values.shape, result.right.shape
    (torch.Size([4, 8]), torch.Size([4, 3, 64]))
    """
    require(topk, Integral, "topk is the number of directions")
    queries, keys = _tensor("query", w_q), _tensor("key", w_k)
    shapes = tuple(queries.shape), tuple(keys.shape)
    if any(len(shape) != 3 or 0 in shape for shape in shapes) or shapes[0][1:] != shapes[1][1:]:
        raise HeadgramError(f"Query weights (H, r, d) and key weights (K, r, d) do not fit together: {shapes}.")
    with torch.no_grad():
        return spectra(qk(queries, keys), int(topk))


def gram(
    w_q_a: Float[Weights, "layers_a heads rank hidden"],
    w_k_a: Float[Weights, "layers_a kv_heads rank hidden"],
    w_q_b: Float[Weights, "layers_b heads rank hidden"],
    w_k_b: Float[Weights, "layers_b kv_heads rank hidden"],
    precision: Precision = "auto",
) -> Float[Tensor, "layers_a layers_b heads"]:
    """Inner products of the heads of one index in every two layers, `[i, j, h] = <g_i^h, g_j^h>`.

    Parameters
    ----------
    w_q_a, w_q_b : (n_a, H, r, d), (n_b, H, r, d)
        Query weights, leading axis: layers. Torch tensors or NumPy arrays, any floating dtype, any device.
    w_k_a, w_k_b : (n_a, K, r, d), (n_b, K, r, d)
        Key weights; query head `h` reads key head `h * K // H`.
    precision
        `auto` takes float32 where weights are no wider and no form is too small for it, so that errors stay below
        `1e-6 ‖g_a‖ ‖g_b‖`; `float64` always takes that.

    Returns
    -------
    (n_a, n_b, H) float64
        On the device of the weights. Half of it is computed where both runs are the same tensors.

    Raises
    ------
    HeadgramError
        If the shapes do not fit together, a weight is not finite, or a product overflows float64.

    Examples
    --------
    >>> import headgram, torch
    >>> w_q, w_k = torch.randn(5, 4, 8, 64), torch.randn(5, 2, 8, 64)
    >>> headgram.gram(w_q, w_k, w_q, w_k).shape
    torch.Size([5, 5, 4])
    """
    if precision not in get_args(Precision):
        raise HeadgramError(f"the precision is one of {', '.join(get_args(Precision))}, not {precision!r:.60}")
    weights = [_tensor(name, each) for name, each in (("query", w_q_a), ("key", w_k_a), ("query", w_q_b), ("key", w_k_b))]
    shapes = [tuple(each.shape) for each in weights]
    if any(len(shape) != 4 or 0 in shape for shape in shapes):
        raise HeadgramError(f"gram takes query (n, H, r, d) and key (n, K, r, d) weights of two ranges of layers, not {shapes}.")
    if shapes[0][1:] != shapes[2][1:] or shapes[1][1:] != shapes[3][1:]:
        raise HeadgramError(f"The two ranges of layers differ in heads, key heads, rank or width: {shapes}.")
    one = qk(weights[0], weights[1])
    other = one if w_q_a is w_q_b and w_k_a is w_k_b else qk(weights[2], weights[3])
    with torch.no_grad():
        return same_index_products(one, other, shapes[0][1], precision).gram


def _tensor(name: str, weights: object) -> Tensor:
    """Finite weights as a torch tensor; a NumPy array is not copied where torch can read it as it is."""
    require(weights, (Tensor, np.ndarray), f"The {name} weights must be a torch tensor or a NumPy array")
    if isinstance(weights, np.ndarray):
        if weights.dtype.kind != "f" or weights.dtype.itemsize > 8:
            raise HeadgramError(f"The {name} weights are {weights.dtype}, not floating point of 16, 32 or 64 bits.")
        weights = torch.from_numpy(np.require(weights, weights.dtype.newbyteorder("="), ["C", "W"]))
    assert isinstance(weights, Tensor)
    if weights.layout != torch.strided or weights.is_meta:
        raise HeadgramError(f"The {name} weights are {'on the meta device' if weights.is_meta else 'sparse'}: give dense ones.")
    check_weights(name, weights)
    return weights.detach()
