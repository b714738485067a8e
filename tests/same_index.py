"""Inner products of equal head indices, from the weights of queries and keys."""

from headgram.forms.circuits import qk
from headgram.geometry.same_index import SameIndexProducts, same_index_products


def pair_products(w_q_a, w_k_a, w_q_b, w_k_b, precision="float64") -> SameIndexProducts:
    one = qk(w_q_a, w_k_a)
    same = w_q_a is w_q_b and w_k_a is w_k_b
    return same_index_products(one, one if same else qk(w_q_b, w_k_b), w_q_a.shape[1], precision)
