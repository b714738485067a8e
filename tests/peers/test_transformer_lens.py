"""Composition and eigenvalues against TransformerLens, on equal heads: `make test-peers`, which installs it in build/peers.

Of the package, only what does the arithmetic is imported, without the rest and all that it needs. Its matrices multiply rows:
`QK` is our `g` transposed, `OV` our `o` transposed.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from headgram.forms.circuits import ov, qk
from headgram.geometry.composition import KINDS, reads, scores, writes
from headgram.geometry.eigenvalues import eigenvalues
from headgram.geometry.spans import kernels, spans

PEERS = Path(__file__).parents[2] / "build" / "peers"
LAYERS, HEADS, RANK, WIDTH = 3, 4, 5, 24


@pytest.fixture(scope="module")
def peer():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEERS))
        for name in ("transformer_lens", *(f"transformer_lens.{part}" for part in ("utilities", "tools", "tools.analysis"))):
            package = ModuleType(name)
            package.__path__ = [str(PEERS / name.replace(".", "/"))]
            patch.setitem(sys.modules, name, package)
        yield importlib.import_module


def test_scores_and_eigenvalues_are_those_of_transformer_lens(peer):
    peer = peer("transformer_lens.utilities.matrix")
    generator = torch.Generator().manual_seed(0)
    q, k, v, o = (torch.randn(LAYERS, HEADS, RANK, WIDTH, generator=generator, dtype=torch.float64) for _ in range(4))
    theirs_qk, theirs_ov = peer.FactoredMatrix(q.mT, k), peer.FactoredMatrix(v.mT, o)
    heads = {"qk": qk(q, k), "ov": ov(v, o)}
    for kind, circuit in KINDS.items():
        right = {"q": theirs_qk, "k": theirs_qk.T, "v": theirs_ov}[kind]
        theirs = peer.composition_scores(theirs_ov, right)  # (L, H, L, H), the earlier head first
        ours = scores(reads(kind, heads[circuit]), writes(heads["ov"])).T.reshape(theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for circuit, theirs in (("qk", theirs_qk), ("ov", theirs_ov)):
        ours, values = eigenvalues(heads[circuit]), theirs.eigenvalues.flatten(0, 1)
        torch.testing.assert_close(ours.values.abs(), values.abs().sort(dim=-1, descending=True).values)
        torch.testing.assert_close(ours.copying, values.real.sum(-1) / values.abs().sum(-1))


def test_projection_kernels_are_those_of_transformer_lens(peer):
    peer = peer("transformer_lens.tools.analysis.projection_kernel")
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(HEADS, RANK, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    ours, z = kernels(*map(spans, factors))
    theirs = [[peer.orthonormal_subspace(each.mT) for each in some] for some in factors]
    scores = torch.tensor([[peer.projection_kernel(a, b).score for b in theirs[1]] for a in theirs[0]])
    torch.testing.assert_close(ours, scores.double(), rtol=1e-5, atol=0)
    chance = peer.random_projection_kernel_moments(WIDTH, RANK)
    torch.testing.assert_close(z, (ours - chance.mean) / chance.variance**0.5)
