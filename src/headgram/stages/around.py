"""What stands around the projections of a model's layers, out of its checkpoint: vectors and numbers, one small file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headgram.checkpoints.known import open_checkpoint
from headgram.errors import MANIFEST, HeadgramError, upgrading
from headgram.families.around import AROUND
from headgram.results.around import write_around
from headgram.results.record import Provenance, seal


def extract_around(
    output: Path,
    record: Path,
    source: Mapping[str, Any],
    locked: Mapping[str, Sequence[tuple[int, str]]],
    provenance: Provenance,
    manifest: Path = MANIFEST,
) -> None:
    """Write the frames of all stacks of a model. What cannot be read is missing there, with the reason, and printed.

    Parameters
    ----------
    source
        The arguments of `open_checkpoint`, as locked.
    locked
        By stack, every layer and what `Checkpoint.digest` said of it when it was locked.
    manifest
        Named by what is said of a checkpoint that changed.

    Raises
    ------
    HeadgramError
        If the checkpoint cannot be opened or is not what was locked.
    """
    try:
        with open_checkpoint(**source) as checkpoint:
            for stack, layers in locked.items():
                for layer, digest in layers:
                    if not checkpoint.holds(stack, layer, digest, AROUND):
                        raise HeadgramError(
                            f"stack {stack}: a norm or a bias of layer {layer} changed since it was locked; "
                            f"{upgrading(provenance.model, manifest)}"
                        )
            found = {stack: checkpoint.frames(stack) for stack in locked}
    except HeadgramError as error:
        raise HeadgramError(f"model {provenance.model}, {error}") from None
    for stack, frames in found.items():
        for reason in dict.fromkeys(frames.missing.values()):
            print(f"{stack}: {reason}", flush=True)
    write_around(output, found)
    seal(record, provenance, [output])
