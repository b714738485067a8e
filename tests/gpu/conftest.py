"""These tests need a GPU, torch, pandas and pyarrow, and `src/` on the path: no Snakemake."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.exit("no GPU that torch can use is visible, and these tests need one", returncode=1)
