"""The two files that the original script writes, for whoever reads those today.

`NAME.json` holds `model, num_layers, num_heads, head_dim, hidden_size, topk, gram, fro_sq`; `NAME-eigdirs.pt` holds
`eig_dirs` and `sym_eigs`. The numbers are the original's own, see `headgram.geometry.original`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.results.files import write_text, written_whole


def directions_path(json_path: Path) -> Path:
    """`NAME-eigdirs.pt` beside `NAME.json`.

    Raises
    ------
    HeadgramError
        If the name does not end in `.json`: both files would then be one.
    """
    if json_path.suffix != ".json":
        raise HeadgramError(f"the output '{json_path}' must end in .json: the directions go to NAME-eigdirs.pt beside it")
    return json_path.with_name(json_path.name.removesuffix(".json") + "-eigdirs.pt")


def write_original_files(
    path: Path,
    model: str,
    head_dim: int,
    gram: Float[Tensor, "layers layers heads"],
    fro_sq: Float[Tensor, "layers heads"],
    eig_dirs: Float[Tensor, "layers heads k hidden"],
    symmetric_eigenvalues: Float[Tensor, "layers heads 2*head_dim"],
) -> None:
    """Write both files. The original's `sym_eigs` are those of `g + g^T`: twice the symmetric part's."""
    layers, heads, topk, hidden = eig_dirs.shape
    content = {
        "model": model,
        "num_layers": layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "topk": topk,
        "gram": gram.tolist(),
        "fro_sq": fro_sq.tolist(),
    }
    with written_whole(directions_path(path)) as file:
        torch.save({"eig_dirs": eig_dirs, "sym_eigs": 2 * symmetric_eigenvalues}, file)
    write_text(path, json.dumps(content))
