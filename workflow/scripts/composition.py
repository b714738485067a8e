"""Composition job: see headgram.stages.composition."""

from pathlib import Path

from headgram.run.job import by_place, running

with running(snakemake) as (provenance, options):
    from headgram.stages.composition import Composed, compose

    weights: dict[str, dict[str, list[Path]]] = {}
    for (stack, circuit, *_), path in by_place(snakemake.input.weights).items():
        weights.setdefault(stack, {}).setdefault(circuit, []).append(path)
    names = ("composition", "channels", "directions", "record")
    compose(weights, Composed(*(Path(snakemake.output[name]) for name in names)), options, provenance)
