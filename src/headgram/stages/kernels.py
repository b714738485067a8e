"""The table `kernels`: how much the spans of any two queries, keys, values and outputs of a stack have in common."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch

from headgram.geometry.costs import KEPT_SPANS
from headgram.geometry.spans import Spans, joined, kernels, spans
from headgram.results.paths import between_streams
from headgram.results.tables import KERNELS, labelled
from headgram.stages.extracted import ExtractedModel

#: Of every role its circuit, and the side of the form that it is.
_ROLES = {"query": ("qk", "b"), "key": ("qk", "a"), "value": ("ov", "b"), "output": ("ov", "a")}


def kernel_tables(extracted: ExtractedModel, device: str, size: int) -> Iterator[pa.Table]:
    """Of every stack, in blocks of at most so many bytes; every two spans of one residual stream once."""
    yield KERNELS.empty_table()
    for stack in extracted.stacks:
        crossing = between_streams(stack)  # keys and values are of another stream then
        for roles in [("query", "output"), ("key", "value")] if crossing else [tuple(_ROLES)]:
            yield from _tables(stack, roles, extracted, device, size)


def _tables(stack: str, roles: tuple[str, ...], extracted: ExtractedModel, device: str, size: int) -> Iterator[pa.Table]:
    folded = all(extracted.folds(stack, circuit) for circuit in ("qk", "ov"))
    files = {role: extracted.files(stack, _ROLES[role][0], folded) for role in roles}
    first = next(iter(files.values()))
    of_layer = sum(file.kv_heads if role in ("key", "value") else file.heads for role, file in files.items())
    most = max(1, size // (4 * of_layer * max(file.rank for file in files.values()) * first.width))
    blocks = [first.layers[start : start + most] for start in range(0, len(first.layers), most)]

    @lru_cache(maxsize=KEPT_SPANS[torch.device(device).type])
    def found(which: int) -> tuple[Spans, dict[str, np.ndarray]]:
        """The spans of all roles of some layers, and which each is."""
        factors = [
            torch.cat([getattr(file.read([layer]), _ROLES[role][1]).to(device) for layer in blocks[which]])
            for role, file in files.items()
        ]
        counts = [len(each) for each in factors]
        layers = np.concatenate([np.repeat(blocks[which], count // len(blocks[which])) for count in counts])
        heads = np.concatenate([np.tile(np.arange(count // len(blocks[which])), len(blocks[which])) for count in counts])
        places = {"role": np.repeat(np.arange(len(roles)), counts), "layer": layers, "head": heads}
        return joined([spans(each) for each in factors]), places

    for i in range(len(blocks)):
        for j in range(i, len(blocks)):
            (x, of_x), (y, of_y) = found(i), found(j)
            kernel, z = (each.numpy() for each in kernels(x, y))
            a, b = np.triu_indices(len(kernel), 1) if i == j else (each.ravel() for each in np.indices(kernel.shape))
            turned = of_x["role"][a] > of_y["role"][b]  # roles stand in their order, whichever layer is first
            both = {name: (of_x[name][a], of_y[name][b]) for name in of_x}
            places = {f"{name}_a": np.where(turned, two, one) for name, (one, two) in both.items()}
            places |= {f"{name}_b": np.where(turned, one, two) for name, (one, two) in both.items()}
            columns = places | {
                **{name: pa.array(roles).take(pa.array(places[name])) for name in ("role_a", "role_b")},
                "kernel": kernel[a, b],
                "expected": (x.ranks.numpy()[a] * y.ranks.numpy()[b]) / first.width,
                "z": z[a, b],
                "folded": np.full(len(a), folded),
            }
            yield labelled(pa.table(columns), KERNELS, stack=stack)
