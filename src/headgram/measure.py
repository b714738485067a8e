"""The original script's command line: one model, one process, its two files."""

from __future__ import annotations

from pathlib import Path

import torch

from headgram.families.layouts import QK
from headgram.forms.circuits import qk
from headgram.geometry.original import original_quantities
from headgram.geometry.same_index import same_index_products
from headgram.geometry.spectra import spectra
from headgram.proofs.adopt import open_checkpoint
from headgram.results.original import directions_path, write_original_files
from headgram.run.devices import leased_device, require_device
from headgram.run.job import usable
from headgram.stages.extract import read_layers


def measure_model(model: str, out: Path, topk: int, revision: str | None, stack: str | None, dtype: str, device: str) -> None:
    """Measure one stack of a checkpoint and write `out` and its `-eigdirs.pt`.

    Raises
    ------
    HeadgramError
        If the checkpoint cannot be read, or `out` does not end in `.json`.
    """
    directions_path(out)  # refuse a bad name before the work, not after it
    with open_checkpoint(model, revision, derive=True) as checkpoint, leased_device(require_device(device)) as leased:
        where = usable(leased)
        chosen = checkpoint.stack(stack) if stack else checkpoint.stacks[0]
        factors = read_layers(checkpoint, chosen.name, chosen.layers, QK, dtype)
        w_q, w_k = (factors[role].to(where) for role in QK)
        layers = [qk(q, k) for q, k in zip(w_q, w_k, strict=True)]
        original = [original_quantities(heads, topk) for heads in layers]
        eigenvalues = [spectra(heads, topk).symmetric_eigenvalues for heads in layers]
        whole = qk(w_q, w_k)
        write_original_files(
            out,
            model,
            head_dim=chosen.rank,
            gram=same_index_products(whole, whole, chosen.heads).gram.cpu(),
            fro_sq=torch.stack([fro_sq for fro_sq, _ in original]).cpu(),
            eig_dirs=torch.stack([directions for _, directions in original]).cpu(),
            symmetric_eigenvalues=torch.stack(eigenvalues).cpu(),
        )
