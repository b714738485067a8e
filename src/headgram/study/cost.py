"""What a plan costs, before anything runs: jobs, operations, bytes, kernels and, on paper, seconds of a GPU.

A roofline: a stage takes as long as its operations at the GPU's peak, or as the bytes that go through its memory, or as
telling the GPU each kernel, whichever is longest; and then as long as copies to the GPU take, which do not overlap with work.
No kernel reaches the peak, and the eigensolver least, so these are the least times: measured ones are held against them.
Imports no torch.
"""

from __future__ import annotations

from headgram.study.plan import Plan
from headgram.study.work import Gpu, Work, of_composition, of_derive, of_eigen, of_gram, of_lineage, of_rotary

#: The stages that compute on a GPU, where there is one, with the options as they are delivered.
STAGES = ("eigen", "gram", "rotary", "derive", "composition", "lineage")

GPUS = (
    Gpu("H100", {"float64": 67e12, "float32": 67e12, "bfloat16": 989e12}, 3.35e12, 64e9),
    Gpu("H200", {"float64": 67e12, "float32": 67e12, "bfloat16": 989e12}, 4.8e12, 64e9),
    Gpu("A100", {"float64": 19.5e12, "float32": 19.5e12, "bfloat16": 312e12}, 2.04e12, 32e9),
    Gpu("L4", {"float64": 0.47e12, "float32": 30.3e12, "bfloat16": 121e12}, 0.3e12, 32e9),
)


def costs(plan: Plan) -> dict[str, Work]:
    """What each stage does that computes on GPUs, for all models of a plan.

    Examples
    --------
    >>> from headgram.study.cost import GPUS, costs
    >>> from headgram.study.options import Config
    >>> from headgram.study.plan import Plan
    >>> nothing = costs(Plan(Config(), {}, [], "", "", ""))
    >>> nothing["eigen"].seconds(GPUS[0])
    0.0
    """
    found = {stage: Work() for stage in STAGES}
    for model in plan.models.values():
        found["derive"].jobs += 1
        if ("rotary", "") in model.recipes:
            found["rotary"].jobs += 1
            for stack in model.stacks_of("qk"):
                found["rotary"].add(of_rotary(model.extracted["qk", stack], plan.config))
        found["composition"].jobs += bool(model.composed)
        for stack in model.composed:
            found["composition"].add(of_composition(model, stack, plan.config))
        for (circuit, _), heads in model.heads.items():
            found["eigen"].add(of_eigen(heads, plan.config, circuit))
            found["gram"].add(of_gram(heads, plan.config))
            found["derive"].add(of_derive(heads, plan.config.eigen.topk))
    for pair in plan.pairs:
        found["lineage"].jobs += 1
        if plan.config.lineage.basis != "tokens":  # how many there are is not known before embeddings are read
            for place in plan.pair_places(pair):
                new, old = (plan.models[name].heads[place] for name in pair)
                found["lineage"].add(of_lineage(new, old, plan.config))
    return found


def table(found: dict[str, Work]) -> str:
    """A row for each stage that has jobs, in Markdown."""
    kinds = ("float64", "float32", "bfloat16")
    head = ["stage", "jobs", *(f"TFLOP {kind}" for kind in kinds), "GB in memory", "GB copied", "times each", "launches"]
    head += [f"{gpu.name}, s" for gpu in GPUS]
    lines = [head, ["---"] * len(head)]
    for stage, work in ((stage, work) for stage, work in found.items() if work.jobs):
        numbers = [*(work.flops[kind] / 1e12 for kind in kinds), work.memory / 1e9, work.copied / 1e9, work.copies, work.launches]
        numbers += [work.seconds(gpu) for gpu in GPUS]
        lines.append([stage, str(work.jobs), *(f"{number:,.0f}" if number >= 100 else f"{number:.2g}" for number in numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
