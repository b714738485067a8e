"""Entries of a lock, made up; imports no torch, as the plan does not."""

from headgram.study.lock import LockedAround, LockedCircuit, LockedModel, LockedStack


def locked_llama(name="m", layers=12, heads=12, kv_heads=4, rank=64, hidden=768, dtype="BF16", first=0) -> LockedModel:
    """The lock's entry of a llama that is nowhere: planning reads the lock alone."""
    factors = {
        circuit: LockedCircuit(
            rank=rank,
            dtype=dtype,
            bytes=layers * (heads + kv_heads) * rank * hidden * 2,
            digests=tuple(f"{name}-{circuit}-{layer:016x}" for layer in range(layers)),
        )
        for circuit in ("qk", "ov")
    }
    around = LockedAround(digests=tuple(f"{name}-around-{layer:016x}" for layer in range(layers)), turns=True)
    shape = {"layers": tuple(range(first, first + layers)), "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    stack = LockedStack(name="self", **shape, circuits=factors, around=around)
    return LockedModel(
        source=f"models/{name}",
        revision=None,
        overrides={},
        commit=None,
        format="safetensors",
        architecture="llama",
        files=(),
        stacks=(stack,),
        fingerprint=f"of {name}",
    )
