"""What forms leave out, taken out of a running model before its scores are compared with theirs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def neutralise(model: nn.Module, attention: set[str]) -> None:
    """Take out of the model's attention modules what `g` leaves out: biases, and norms of queries and keys."""
    for module in model.modules():
        if "Sinusoidal" in type(module).__name__ and isinstance(weight := getattr(module, "weight", None), Tensor):
            sines, cosines = weight.data.chunk(2, -1)  # a rotary encoding, if that is what it is for, is the identity
            sines.zero_(), cosines.fill_(1)
        for turn in module.buffers(recurse=False) if "Rotary" in type(module).__name__ else ():
            if turn.is_complex():  # made with the model, and not when it runs
                turn.fill_(1)
    for path in attention:
        module = model.get_submodule(path)
        for name, weight in module.named_parameters():
            if "bias" in name:
                weight.data.zero_()
        for name, norm in module.named_modules():
            if is_norm(norm):
                norm.forward = _gain(norm.weight) if name.endswith("_a_layernorm") else _same


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, as its name says."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _gain(weight: Any) -> Any:
    return lambda x: x * weight
