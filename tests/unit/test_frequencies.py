"""Forms that turn with the offset, against the definition: `R` as a matrix, and forms held whole, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headgram.forms.circuits import qk
from headgram.forms.heads import Heads
from headgram.forms.reading import Rotary
from headgram.forms.transforms import rotated
from headgram.geometry.frequencies import energies, energies_by_chance

RANK, WIDTH = 8, 11
ROTARIES = {
    "halves": Rotary(torch.tensor([1.0, 0.3, 0.05, 0.007], dtype=torch.float64), interleaved=False),
    "interleaved": Rotary(torch.tensor([1.0, 0.3, 0.05, 0.007], dtype=torch.float64), interleaved=True),
    "partial halves": Rotary(torch.tensor([1.0, 0.3], dtype=torch.float64), interleaved=False),
    "partial interleaved": Rotary(torch.tensor([1.0, 0.3], dtype=torch.float64), interleaved=True),
    "last rows, scaled": Rotary(torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64), interleaved=True, start=2, factor=1.3),
}


def heads(count: int = 4, shared: int = 2) -> Heads:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, RANK, WIDTH, generator=generator, dtype=torch.float64) for n in (count, shared))
    return qk(q * torch.linspace(0.2, 3, RANK)[:, None], k * torch.linspace(2, 0.5, RANK)[:, None])


def matrix(rotary: Rotary, offset: float) -> Tensor:
    """`R(offset)`, with the square of the factor on the rows that turn, entry by entry."""
    result = torch.eye(RANK, dtype=torch.float64)
    planes = len(rotary.frequencies)
    for plane, frequency in enumerate(rotary.frequencies.tolist()):
        first = rotary.start + (2 * plane if rotary.interleaved else plane)
        second = first + (1 if rotary.interleaved else planes)
        cosine, sine = math.cos(offset * frequency), math.sin(offset * frequency)
        turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64) * rotary.factor**2
        result[[[first], [second]], [first, second]] = turn
    return result


def at(both: Heads, rotary: Rotary, head: int, offset: float) -> Tensor:
    return both.left()[head].mT @ matrix(rotary, offset) @ both.right()[head]


@pytest.mark.parametrize("name", ROTARIES)
@pytest.mark.parametrize("offset", [0, 1, -3, 64, 1000.5])
def test_forms_at_an_offset(name: str, offset: float) -> None:
    both, rotary = heads(), ROTARIES[name]
    turned = rotated(both, rotary, offset)
    for head in range(len(both)):
        torch.testing.assert_close(turned.form(head), at(both, rotary, head, offset), rtol=1e-12, atol=1e-12)


def test_scores_depend_on_the_offset_alone() -> None:
    """A query at 9 and a key at 4, turned each by its own position."""
    both, rotary = heads(), ROTARIES["halves"]
    query, key = rotary.turned(both.right(), 9), rotary.turned(both.left(), 4)
    torch.testing.assert_close(key.mT @ query, torch.stack([rotated(both, rotary, 5).form(head) for head in range(4)]))


@pytest.mark.parametrize("name", ROTARIES)
def test_energies_are_those_of_forms_held_whole(name: str) -> None:
    both, rotary = heads(), ROTARIES[name]
    found = energies(both, rotary)
    scaled = rotary.factor**2
    for head in range(len(both)):
        k, q = both.left()[head], both.right()[head]
        still = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        turning = set()
        for plane, (first, second) in enumerate(zip(*(rows.tolist() for rows in rotary.rows), strict=True)):
            c = scaled * (torch.outer(k[first], q[first]) + torch.outer(k[second], q[second]))
            s = scaled * (torch.outer(k[second], q[first]) - torch.outer(k[first], q[second]))
            turning |= {first, second}
            torch.testing.assert_close(found.cosine[head, plane], c.square().sum())
            torch.testing.assert_close(found.sine[head, plane], s.square().sum())
            torch.testing.assert_close(found.planes[head, plane], (c.square().sum() + s.square().sum()) / 2)
        for row in set(range(RANK)) - turning:
            still += torch.outer(k[row], q[row])
        torch.testing.assert_close(found.still[head], still.square().sum())


@pytest.mark.parametrize("name", ["halves", "partial interleaved", "last rows, scaled"])
def test_energies_are_what_a_form_has_on_average_over_offsets(name: str) -> None:
    both, rotary = heads(), ROTARIES[name]
    turns = torch.stack([matrix(rotary, offset) for offset in range(2000)])
    forms = both.left()[0].mT @ turns @ both.right()[0]
    mean = forms.square().sum((1, 2)).mean()
    torch.testing.assert_close(energies(both, rotary).total[0], mean, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["halves", "partial halves", "last rows, scaled"])
def test_energies_by_chance_are_the_mean_over_random_bases(name: str) -> None:
    both, rotary = heads(1, 1), ROTARIES[name]
    plain = Rotary(rotary.frequencies, rotary.interleaved, rotary.start)  # the factor belongs to rows, not to a basis
    expected = energies_by_chance(both, plain)
    generator = torch.Generator().manual_seed(1)
    bases, upper = torch.linalg.qr(torch.randn(20_000, RANK, RANK, generator=generator, dtype=torch.float64))
    bases = bases * upper.diagonal(dim1=1, dim2=2).sign()[:, None]
    drawn = energies(qk((bases @ both.right()).unsqueeze(1).flatten(0, 1), bases @ both.left()), plain)
    for values, mean in zip(
        (drawn.planes, drawn.cosine, drawn.sine, drawn.still),
        (expected.planes[0], expected.cosine[0], expected.sine[0], expected.still[0]),
        strict=True,
    ):
        error = values.std(0) / len(values) ** 0.5
        assert bool(((values.mean(0) - mean).abs() <= 4.5 * error + 1e-9 * mean.abs()).all())
