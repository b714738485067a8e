"""A thousand models are planned in a minute; nothing to do is nothing to wait for. Limits leave room for slow machines."""

import json
import os
import subprocess
import time

from headgram.lock import LockedModel, LockedStack, write_lock


def entry(i: int) -> LockedModel:
    """A small llama that is nowhere: planning reads the lock alone."""
    layers = 12
    stack = LockedStack(
        name="self",
        layers=tuple(range(layers)),
        heads=12,
        kv_heads=4,
        rank=64,
        hidden=768,
        dtype="BF16",
        qk_bytes=layers * 16 * 64 * 768 * 2,
        digests=tuple(f"{i:016x}{layer:016x}" for layer in range(layers)),
    )
    return LockedModel(
        source=f"models/{i}",
        revision=None,
        overrides={},
        commit=None,
        format="safetensors",
        architecture="llama",
        files=(),
        stacks=(stack,),
        fingerprint=f"{i:032x}",
    )


def test_a_thousand_models_are_planned_quickly_and_within_a_gibibyte(project):
    models = {f"model-{i:04d}": entry(i) for i in range(1000)}
    rows = [f"{name}\t{entry.source}" for name, entry in models.items()]
    (project.folder / "many.tsv").write_text("name\tsource\n" + "\n".join(rows) + "\n")
    write_lock(project.folder / "many.lock.json", models)
    command = project.command("-n", "--quiet", "--config", "manifest=many.tsv")
    process = subprocess.Popen(command, cwd=project.folder, env=project.environment(), stdout=subprocess.PIPE)
    planned = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert process.returncode == 0
    print(f"1,000 models planned: {usage.ru_utime + usage.ru_stime:.1f} s of CPU, {usage.ru_maxrss >> 10} MiB; {planned}")
    assert usage.ru_utime + usage.ru_stime < 120  # 33 on a free core; machines differ
    assert usage.ru_maxrss < 2**20  # KiB


def test_nothing_to_do_is_soon_said(finished):
    """Of CPU: the machine of a test may be busy."""
    before, start = os.times(), time.monotonic()
    done = finished.snakemake("--cores", "2")
    seconds = time.monotonic() - start
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr
    print(json.dumps({"wall": round(seconds, 1), "cpu": round(cpu, 1)}))
    assert cpu < 6  # 2 on a free core; machines differ
