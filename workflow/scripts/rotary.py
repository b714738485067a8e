"""Job that measures how scores depend on offsets: see headgram.stages.rotary."""

from pathlib import Path

from headgram.run.job import around_of, by_place, running

with running(snakemake) as (provenance, options):
    from headgram.stages.rotary import Turned, measure_rotary

    weights: dict[str, list[Path]] = {}
    for (stack, *_), path in by_place(snakemake.input.weights).items():
        weights.setdefault(stack, []).append(path)
    written = Turned(*(Path(snakemake.output[name]) for name in ("rotary", "frequencies", "turning", "record")))
    around = around_of(snakemake.input)
    assert around is not None
    measure_rotary(around, weights, written, options, provenance)
