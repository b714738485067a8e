"""Lineages: models that share a basis, and which two of them are compared."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping

from headgram.study.lock import LockedModel
from headgram.study.manifest import Labels, Row

#: A model and an earlier one of its lineage.
Pair = tuple[str, str]


def by_step(labels: Mapping[str, Labels]) -> dict[str, list[str]]:
    """The models of every lineage in the order of their steps."""
    lineages: dict[str, list[str]] = {}
    for name in sorted(labels, key=lambda name: labels[name].step or 0.0):
        if labels[name].lineage:
            lineages.setdefault(labels[name].lineage, []).append(name)
    return lineages


def pairs(labels: Mapping[str, Labels], wanted: Collection[str]) -> list[Pair]:
    """The pairs of models that the option `lineage.pairs` asks for, each with the earlier one last.

    Examples
    --------
    >>> steps = {name: Labels("training", step) for name, step in (("start", 0), ("end", 9), ("middle", 5))}
    >>> pairs(steps, ["neighbours", "first"])
    [('middle', 'start'), ('end', 'start'), ('end', 'middle')]
    """
    found: list[Pair] = []
    for names in by_step(labels).values():
        for (i, earlier), (j, later) in itertools.combinations(enumerate(names), 2):
            kinds = {"all", *(["neighbours"] * (j == i + 1)), *(["first"] * (i == 0)), *(["last"] * (j == len(names) - 1))}
            if kinds & set(wanted):
                found.append((later, earlier))
    return found


def misfits(rows: Iterable[Row], entries: Mapping[str, LockedModel], basis: str = "residual") -> list[str]:
    """A sentence about every model that the first one of its lineage cannot be compared with.

    Models of other shapes share no residual basis; in token space, it is enough that they have a stack in common.
    """
    first: dict[str, Row] = {}
    problems = []
    for row in rows:
        if not row.labels.lineage or row.name not in entries:
            continue
        model = first.setdefault(row.labels.lineage, row)
        shapes = [_shape(entries[each.name]) for each in (model, row)]
        apart = f"has stacks {', '.join(shapes[1])}, but {model.name} has {', '.join(shapes[0])}"
        if basis == "tokens":
            what = "" if shapes[0].keys() & shapes[1].keys() else apart
        elif shapes[0].keys() != shapes[1].keys():
            what = apart
        else:
            differences = (
                f"has {name} {ours[name]} in stack {stack}, but {model.name} has {theirs[name]}"
                for stack, ours in shapes[1].items()
                for theirs in [shapes[0][stack]]
                for name in ours
                if name in theirs and ours[name] != theirs[name]
            )
            what = next(differences, "")
        if what:
            lineage = f"of the lineage '{row.labels.lineage}': name another lineage, or remove the line"
            if basis == "residual":
                lineage += "; independent models are compared with --config 'lineage={basis: tokens}'"
            problems.append(f"line {row.line} ({row.name}): it {what}, {lineage}")
    return problems


def _shape(entry: LockedModel) -> dict[str, dict[str, int | str]]:
    """By stack, what two models of one lineage must agree in."""
    return {
        stack.name: {
            "width": stack.hidden,
            "layers": len(stack.layers),
            "layer numbers": ", ".join(map(str, stack.layers)),
            "heads": stack.heads,
            "key heads": stack.kv_heads,
            **{f"rank of {name}": circuit.rank for name, circuit in stack.circuits.items()},
        }
        for stack in entry.stacks
    }
