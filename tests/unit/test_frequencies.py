"""Forms that turn with the offset, against the definition: `R` as a matrix, and forms held whole, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headgram.forms.circuits import qk
from headgram.forms.heads import Heads
from headgram.forms.reading import Rotary
from headgram.geometry.frequencies import RotaryHeads, at_offsets, by_chance, energies, offsets_up_to, turning
from rotated import rotated

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
    found = energies(RotaryHeads.of(both, rotary))
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
    torch.testing.assert_close(energies(RotaryHeads.of(both, rotary)).total[0], mean, rtol=0.02, atol=0)


OFFSETS = (0, 1, -3, 64)


@pytest.mark.parametrize("name", ROTARIES)
def test_forms_at_offsets_are_those_held_whole(name: str) -> None:
    both, rotary = heads(), ROTARIES[name]
    found = at_offsets(RotaryHeads.of(both, rotary), OFFSETS)
    for head in range(len(both)):
        home = at(both, rotary, head, 0)
        for place, offset in enumerate(OFFSETS):
            form = at(both, rotary, head, offset)
            size = form.norm() * home.norm()
            symmetric = (form + form.mT) / 2
            truth = {
                "norm": form.norm(),
                "cosine": (form * home).sum() / size,
                "transposed": (form * home.mT).sum() / size,
                "symmetry": symmetric.square().sum() / form.square().sum(),
                "trace": form.trace(),
            }
            for column, value in truth.items():
                torch.testing.assert_close(getattr(found, column)[head, place], value, rtol=1e-11, atol=1e-12, msg=column)


@pytest.mark.parametrize("name", ROTARIES)
@pytest.mark.parametrize("context", [1, 7, 100])
def test_what_turns_within_a_context_is_what_forms_held_whole_say(name: str, context: int) -> None:
    both, rotary = heads(), ROTARIES[name]
    found, shares = turning(RotaryHeads.of(both, rotary), context), energies(RotaryHeads.of(both, rotary))
    lengths = 2 * math.pi / rotary.frequencies
    for head in range(len(both)):
        forms = torch.stack([at(both, rotary, head, offset) for offset in range(context)])
        planes = shares.planes[head]
        truth = {
            "positional": 1 - forms.mean(0).square().sum() / forms.square().sum((1, 2)).mean(),
            "speed": (at(both, rotary, head, 1) - at(both, rotary, head, 0)).norm() / at(both, rotary, head, 0).norm(),
            "beyond": planes[lengths > context].sum() / shares.total[head],
            "wavelength": (planes * lengths).sum() / planes.sum(),
            "sine": shares.sine[head].sum() / (shares.sine[head] + shares.cosine[head]).sum(),
            "still": shares.still[head] / shares.total[head],
            "norm": shares.total[head].sqrt(),
        }
        for column, value in truth.items():
            torch.testing.assert_close(getattr(found, column)[head], value, rtol=1e-9, atol=1e-12, msg=column)


def test_planes_that_do_not_turn_are_still() -> None:
    both, still = heads(), [1, 3, 4, 5, 6, 7]
    rotary = Rotary(torch.tensor([1.0, 0.0], dtype=torch.float64), interleaved=False)
    found = energies(RotaryHeads.of(both, rotary))
    assert bool((found.planes[:, 1] == 0).all())
    assert turning(RotaryHeads.of(both, rotary), None).wavelength.tolist() == pytest.approx([2 * math.pi] * 4)
    forms = both.left()[:, still].mT @ both.right()[:, still]
    torch.testing.assert_close(found.still, forms.square().sum((1, 2)))


def test_zero_forms_have_no_ratios_that_are_not_numbers() -> None:
    none = qk(torch.zeros(1, RANK, WIDTH), torch.ones(1, RANK, WIDTH))
    turned = RotaryHeads.of(none, ROTARIES["halves"])
    found = at_offsets(turned, OFFSETS), turning(turned, 10)
    assert all(bool((value == 0).all()) for each in found for value in vars(each).values())


@pytest.mark.parametrize("name", ROTARIES)
def test_chance_is_what_random_weights_of_a_large_width_give(name: str) -> None:
    rotary = ROTARIES[name]
    generator = torch.Generator().manual_seed(2)
    drawn = RotaryHeads.of(qk(*(torch.randn(40, RANK, 20_000, generator=generator) for _ in range(2))), rotary)
    chance = RotaryHeads.of(by_chance(rotary, RANK), rotary)
    for column in ("cosine", "norm"):
        mean = getattr(at_offsets(drawn, OFFSETS), column).mean(0) / (20_000 if column == "norm" else 1)
        torch.testing.assert_close(mean, getattr(at_offsets(chance, OFFSETS), column)[0], rtol=0.02, atol=0.02)
    for column in ("still", "wavelength", "sine", "speed", "beyond", "positional"):
        mean = getattr(turning(drawn, 50), column).mean(0)
        torch.testing.assert_close(mean, getattr(turning(chance, 50), column)[0], rtol=0.02, atol=0.01, msg=column)


def test_offsets_stay_within_the_context() -> None:
    assert offsets_up_to(9) == [-3, -2, -1, 0, 1, 2, 3, 4, 8]
    assert offsets_up_to(2) == [-2, -1, 0, 1, 2]
    assert offsets_up_to(None)[-1] == 1024
