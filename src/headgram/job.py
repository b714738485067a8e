"""What every script of the pipeline has in common: its log, its device, its provenance, and how it fails."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headgram.artifacts import Identity, Provenance
from headgram.devices import leased_device
from headgram.errors import HeadgramError


@contextlib.contextmanager
def running(snakemake: Any) -> Iterator[Provenance]:
    """Run the body of a script as a job.

    Output goes to the rule's log. A `HeadgramError` is printed as one sentence and ends the job with exit code 1; any
    other error leaves its traceback in the log.
    """
    log = Path(snakemake.log[0])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            with leased_device(bool(snakemake.resources.get("gpu", 0))) as device:
                _limit_threads(snakemake.threads)
                yield _provenance(snakemake, device)
        except HeadgramError as error:
            message = f"headgram: {error}"
        except Exception:
            traceback.print_exc()
            raise
        else:
            return
        print(message)
    print(message, file=sys.stderr)
    raise SystemExit(1)


def _provenance(snakemake: Any, device: str) -> Provenance:
    identity = Identity(
        stage=snakemake.rule,
        config=snakemake.params.config,
        fingerprint=snakemake.params.fingerprint,
        code=snakemake.params.code,
        upstream=tuple(json.loads(snakemake.params.upstream)),
    )
    return Provenance(identity, snakemake.wildcards.model, snakemake.wildcards.get("stack"), device)


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
