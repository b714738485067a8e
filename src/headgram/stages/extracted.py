"""What a stage reads of a model whose stacks were extracted: factors of both circuits, and what stands around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from headgram.forms.heads import Heads
from headgram.forms.reading import Frames, Norm, Rotary
from headgram.forms.variants import FOLDED, RAW, Variant, needs
from headgram.results.around import read_around
from headgram.results.factors import FactorFiles
from headgram.results.paths import between_streams

if TYPE_CHECKING:
    import pyarrow as pa


class ExtractedModel:
    """The extracted factors of some stacks; files are opened when they are asked for.

    Parameters
    ----------
    weights
        By stack and circuit, the extracted weights of all of its layers.
    keys
        By circuit, the key of its extraction.
    frames
        By stack, what stands around its heads; without it, nothing is known of that.
    """

    def __init__(
        self, weights: Mapping[str, Mapping[str, Sequence[Path]]], keys: Mapping[str, str], frames: Mapping[str, Frames]
    ) -> None:
        self._weights, self._keys, self._frames = weights, keys, frames
        self.files = cache(self._files)

    @classmethod
    def read(
        cls,
        weights: Mapping[tuple[str, ...], Path],
        keys: Iterator[str],
        around: tuple[Path, Path] | None,
    ) -> ExtractedModel:
        """The sources of a job.

        Parameters
        ----------
        weights
            By stack, circuit, stage and name.
        keys
            Those of the job's inputs, of which the next are taken: one for each circuit, then that of `around`.
        around
            The file with what stands around heads, and its record. None where the lock does not pin that.
        """
        by_stack: dict[str, dict[str, list[Path]]] = {}
        for (stack, circuit, *_), path in weights.items():
            by_stack.setdefault(stack, {}).setdefault(circuit, []).append(path)
        of_circuits = {circuit: next(keys) for circuit in dict.fromkeys(circuit for _, circuit, *_ in weights)}
        return cls(by_stack, of_circuits, read_around(*around, next(keys)) if around else {})

    @property
    def stacks(self) -> list[str]:
        return list(self._weights)

    @property
    def places(self) -> list[tuple[str, str]]:
        """Stacks and their circuits."""
        return [(stack, circuit) for stack, circuits in self._weights.items() for circuit in circuits]

    def norms(self, stack: str) -> dict[int, Norm | None] | None:
        """By layer, the norm of what a stack's heads read, None where there is none; None altogether where it is not known."""
        frames = self._frames.get(stack)
        if frames is None or "norm" in frames.missing:
            return None
        return {layer: frame.norm for layer, frame in frames.layers.items()}

    def folds(self, stack: str, circuit: str) -> bool:
        """Whether the norms before a stack's heads are known, so that they are folded into the forms of a circuit."""
        frames = self._frames.get(stack)
        return frames is not None and not set(needs(Variant(circuit, FOLDED))) & set(frames.missing)

    def rotaries(self, stack: str) -> dict[int, Rotary | None]:
        """By layer, how positions turn queries and keys; empty where they turn none, or it is not known how."""
        frames = self._frames.get(stack)
        found = {} if frames is None else {layer: frame.rotary for layer, frame in frames.layers.items()}
        return found if any(found.values()) else {}

    def writer(self, stack: str, kind: str) -> str | None:
        """The stack whose heads write what heads of a stack read in a kind of composition; None if it is not there.

        Cross-attention takes keys and values from what the encoder has written, of which nothing is known here but its width.
        """
        if kind == "q" or not between_streams(stack):
            return stack
        if stack != "cross" or "encoder" not in self._weights:
            return None
        same = self.files(stack, "ov", False).width == self.files("encoder", "ov", False).width
        return "encoder" if same else None

    def _files(self, stack: str, circuit: str, folded: bool) -> FactorFiles:
        form = Variant(circuit, FOLDED if folded else RAW).name
        return FactorFiles(self._weights[stack][circuit], self._keys[circuit], form, self._frames.get(stack))


def single(files: FactorFiles, pairs: pa.Table, side: str, device: str) -> Heads:
    """The heads of some pairs on one side, `a` or `b`, with factors of their own."""
    places = (pairs[f"{name}_{side}"].to_pylist() for name in ("layer", "head"))
    return files.single(list(zip(*places, strict=True))).to(device)
