"""What attention computes in a running model: the queries, the keys and their inputs, caught where their product is made.

The code of the models is left as it is: hooks tell which module runs and what it is given, and a torch function mode sees
every matrix product. The first product in a module of shape (tokens, tokens) is that module's scores.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm)
#: What modules call the input of their keys where it is not that of their queries.
_KEY_INPUTS = ("key_value_states", "encoder_hidden_states")


@dataclass(frozen=True)
class Call:
    """One product of queries and keys, `(H, t, r)` and `(H, s, r)`, and the inputs `(t, d)` and `(s, d)` that they come from."""

    module: str
    query: Float[Tensor, "heads t rank"]
    key: Float[Tensor, "heads s rank"]
    x: Float[Tensor, "t hidden"]
    y: Float[Tensor, "s hidden"]

    @property
    def layer(self) -> int | None:
        """The first number in the module's path."""
        number = re.search(r"\.(\d+)(\.|$)", self.module)
        return int(number[1]) if number else None


def scores_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Call]:
    """Run a model, and catch the product of queries and keys in every module that computes one."""
    with torch.no_grad(), _Watch(model) as watch:
        model(**inputs)
    return watch.calls


def neutralise(model: nn.Module, attention: set[str]) -> None:
    """Take out of the model's attention modules what `g` leaves out: biases, and norms of queries and keys."""
    for path in attention:
        module = model.get_submodule(path)
        for name, weight in module.named_parameters():
            if "bias" in name:
                weight.data.zero_()
        for name, norm in module.named_modules():
            if "norm" in type(norm).__name__.lower() and not list(norm.children()):
                norm.forward = _gain(norm.weight) if name.endswith("_a_layernorm") else _same


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _gain(weight: Any) -> Any:
    return lambda x: x * weight


@dataclass
class _Running:
    """A module whose `forward` is under way, with what its queries and its keys are made of."""

    module: str
    x: Tensor | None
    y: Tensor | None
    caught: bool = field(default=False)


class _Watch(TorchFunctionMode):
    """Catches, in every module of a model that runs, its first product of shape (tokens, tokens)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._model = model
        self._running: list[_Running] = []
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for path, module in self._model.named_modules():
            for hook in (
                module.register_forward_pre_hook(self._enters(path), with_kwargs=True),
                module.register_forward_hook(lambda *_: self._running.pop() and None),
            ):
                self._hooks.callback(hook.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def _enters(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
            given = {**given, **given.get("kwargs", {})}
            x = given.get("hidden_states", args[0] if args else None)
            y = next((given[name] for name in _KEY_INPUTS if isinstance(given.get(name), Tensor)), x)
            self._running.append(_Running(path, x if isinstance(x, Tensor) else None, y if isinstance(y, Tensor) else None))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and self._running:
            query, key = (kwargs["batch1"], kwargs["batch2"]) if kwargs and "batch1" in kwargs else args[-2:]
            self._product(self._running[-1], query, key, result)
        return result

    def _product(self, running: _Running, query: Tensor, key: Tensor, scores: Tensor) -> None:
        x, y = running.x, running.y
        if running.caught or x is None or y is None or x.dim() < 2 or tuple(scores.shape[-2:]) != (x.shape[-2], y.shape[-2]):
            return
        running.caught = True
        heads = scores.reshape(-1, *scores.shape[-2:]).shape[0]

        def per_head(tensor: Tensor) -> Tensor:
            flat = tensor.reshape(-1, *tensor.shape[-2:]).double()
            return flat.repeat_interleave(heads // len(flat), 0)

        self.calls.append(
            Call(
                running.module,
                per_head(query),
                per_head(key).transpose(1, 2),
                x.double().reshape(-1, x.shape[-1]),
                y.double().reshape(-1, y.shape[-1]),
            )
        )
