"""A model at a hub that runs in the tests."""

from __future__ import annotations

import torch

from headgram.checkpoints.known import open_checkpoint

REPO = "someone/tiny"


def assert_reads(tensors: dict[str, torch.Tensor], **options) -> None:
    with open_checkpoint(REPO, **options) as checkpoint:
        for layer in checkpoint.stacks[0].layers:
            q, k = checkpoint.qk("self", layer)
            assert torch.equal(q.flatten(0, 1), tensors[f"model.layers.{layer}.self_attn.q_proj.weight"])
            assert torch.equal(k.flatten(0, 1), tensors[f"model.layers.{layer}.self_attn.k_proj.weight"])
