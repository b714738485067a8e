"""The arithmetic for those who hold tensors: `headgram.spectrum` and `headgram.gram`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.forms.circuits import qk
from headgram.geometry.checks import check_floating, check_weights
from headgram.geometry.inner import Precision
from headgram.geometry.same_index import same_index_products
from headgram.geometry.spectra import Spectrum, spectra


def spectrum(w_q: Float[Tensor, "heads rank hidden"], w_k: Float[Tensor, "kv_heads rank hidden"], topk: int = 8) -> Spectrum:
    """Measure every head of one layer, `g = W_K^T W_Q`.

    Parameters
    ----------
    w_q : (H, r, d)
        Query weights, any floating dtype, any device: `q = W_Q x`.
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
    if w_q.ndim != 3 or w_k.ndim != 3 or w_q.shape[2] != w_k.shape[2]:
        raise HeadgramError(
            f"Query weights (H, r, d) and key weights (K, r, d) do not fit together: {tuple(w_q.shape)} and {tuple(w_k.shape)}."
        )
    check_weights("query", w_q)
    check_weights("key", w_k)
    return spectra(qk(w_q, w_k), topk)


def gram(
    w_q_a: Float[Tensor, "layers_a heads rank hidden"],
    w_k_a: Float[Tensor, "layers_a kv_heads rank hidden"],
    w_q_b: Float[Tensor, "layers_b heads rank hidden"],
    w_k_b: Float[Tensor, "layers_b kv_heads rank hidden"],
    precision: Precision = "auto",
) -> Float[Tensor, "layers_a layers_b heads"]:
    """Inner products of the heads of one index in every two layers, `[i, j, h] = <g_i^h, g_j^h>`.

    Parameters
    ----------
    w_q_a, w_q_b : (n_a, H, r, d), (n_b, H, r, d)
        Query weights, leading axis: layers. Any floating dtype, any device.
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
    shapes = [tuple(weight.shape) for weight in (w_q_a, w_k_a, w_q_b, w_k_b)]
    if any(len(shape) != 4 or 0 in shape for shape in shapes):
        raise HeadgramError(f"gram takes query (n, H, r, d) and key (n, K, r, d) weights of two runs of layers, not {shapes}.")
    if shapes[0][1:] != shapes[2][1:] or shapes[1][1:] != shapes[3][1:]:
        raise HeadgramError(f"The two runs of layers differ in heads, key heads, rank or width: {shapes}.")
    for name, weights in (("query", w_q_a), ("key", w_k_a), ("query", w_q_b), ("key", w_k_b)):
        check_floating(name, weights)
    one = qk(w_q_a, w_k_a)
    other = one if w_q_a is w_q_b and w_k_a is w_k_b else qk(w_q_b, w_k_b)
    with torch.no_grad():
        return same_index_products(one, other, w_q_a.shape[1], precision).gram
