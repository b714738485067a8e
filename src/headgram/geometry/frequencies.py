"""How much of a head's form turns with the offset, and how fast, from products of its factors alone.

    g(δ) = W_K^T R(δ) W_Q = g_still + Σ_t [cos(δ θ_t) C_t + sin(δ θ_t) S_t]
    C_t = k_1 q_1^T + k_2 q_2^T,  S_t = k_2 q_1^T - k_1 q_2^T

with the two rows of plane `t` in queries and keys. The mean of `‖g(δ)‖²` over all offsets is `‖g_still‖² + Σ_t E_t`, and

    E_t = ½ (‖q_1‖² + ‖q_2‖²) (‖k_1‖² + ‖k_2‖²) = ½ (‖C_t‖² + ‖S_t‖²)

if frequencies differ from each other and from 0. These energies are the counterpart, from weights alone, of the norms per
frequency of Barbero et al., "Round and round we go! What makes rotary positional encodings useful?" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.forms.heads import Heads
from headgram.forms.reading import Rotary


@dataclass(frozen=True)
class Energies:
    """Of `n` heads: what turns in every plane, and what does not turn at all; float64.

    Attributes
    ----------
    planes : (n, planes)
        `E_t`.
    cosine, sine : (n, planes)
        `‖C_t‖²` and `‖S_t‖²`, whose mean is `E_t`.
    still : (n,)
        `‖g_still‖²`, of the rows that no rotation touches.
    """

    planes: Float[Tensor, "n planes"]
    cosine: Float[Tensor, "n planes"]
    sine: Float[Tensor, "n planes"]
    still: Float[Tensor, " n"]

    @property
    def total(self) -> Float[Tensor, " n"]:
        """The mean of `‖g(δ)‖²` over all offsets."""
        return self.still + self.planes.sum(-1)


@torch.no_grad()
def energies(heads: Heads, rotary: Rotary) -> Energies:
    """Energies of every plane of `qk` forms.

    Parameters
    ----------
    heads
        `n` forms with keys on the left and queries on the right.
    rotary
        How their layer turns them.

    Returns
    -------
    Energies

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import qk
    >>> rotary = Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64), interleaved=False)
    >>> energies(qk(torch.ones(1, 4, 8), torch.ones(1, 4, 8)), rotary).planes
    tensor([[128., 128.]], dtype=torch.float64)
    """
    first, second = rotary.rows
    turning = torch.zeros(heads.rank, dtype=torch.bool, device=heads.device)
    turning[torch.cat([first, second])] = True
    q, k = _grams(heads, rotary)
    q_11, q_12, q_22 = q[:, first, first], q[:, first, second], q[:, second, second]
    k_11, k_12, k_22 = k[:, first, first], k[:, first, second], k[:, second, second]
    own, crossed = k_11 * q_11 + k_22 * q_22, k_22 * q_11 + k_11 * q_22
    cosine, sine = own + 2 * k_12 * q_12, crossed - 2 * k_12 * q_12
    still = (q[:, ~turning][:, :, ~turning] * k[:, ~turning][:, :, ~turning]).sum((1, 2))
    return Energies((own + crossed) / 2, cosine.clamp_min(0), sine.clamp_min(0), still.clamp_min(0))


def energies_by_chance(heads: Heads, rotary: Rotary) -> Energies:
    """What energies are on average if the forms stay, but the basis of queries and keys is turned at random: planes mean nothing.

    `(W_Q, W_K)` and `(U W_Q, U W_K)` give one form for every orthogonal `U`, so that only training with rotary encoding sets rows
    apart. Exact second moments of the Haar measure over `U`: of symmetric `Q`, `K` with traceless parts `Q_0`, `K_0`, and the
    projector `P` onto `p` of `r` rows, `E <P, U Q U^T> <P, U K U^T> = p² tr Q tr K / r² + <Q_0, K_0> (p - p²/r) / m` with `m =
    (r - 1)(r + 2) / 2`.

    Returns
    -------
    Energies
        Their means; those of all planes of a head are equal.
    """
    rank, planes = heads.rank, len(rotary.frequencies)
    q, k = _grams(heads, rotary)
    traces = (q.diagonal(dim1=1, dim2=2).sum(-1) * k.diagonal(dim1=1, dim2=2).sum(-1)) / rank**2
    traceless = ((q * k).sum((1, 2)) - rank * traces) / max((rank - 1) * (rank + 2) / 2, 1)
    plane = (4 * traces + traceless * (2 - 4 / rank)) / 2
    kept = rank - 2 * planes  # rows that do not turn: E ‖P Q P K‖ over blocks of that size
    still = kept * traces + traceless * (kept * (kept + 1) / 2 - kept / rank)
    each = plane[:, None].expand(-1, planes)
    turned = 2 * traceless[:, None].expand(-1, planes)
    return Energies(each, each + turned, each - turned, still)


def _grams(heads: Heads, rotary: Rotary) -> tuple[Float[Tensor, "n rank rank"], Float[Tensor, "n rank rank"]]:
    """`W_Q W_Q^T` and `W_K W_K^T` of every head, float64."""
    a, b = heads.a.double(), rotary.scaled(heads.b)
    return (b @ b.mT)[heads.reads_b.to(heads.device)], (a @ a.mT)[heads.reads_a.to(heads.device)]
