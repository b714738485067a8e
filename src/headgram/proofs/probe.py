"""What attention computes in a running model, caught where its two products are made: that of queries and keys, and that of
weights and values, with the inputs of all and the projection that the second is handed to.

The code of the models is left as it is: hooks tell which module runs and what it is given, and a torch function mode sees
every matrix product. The first product in a module of shape (tokens, tokens) is that module's scores; the next that has such a
matrix on its left is its reading of values; the next module with a weight that takes the heads side by side writes.
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
_SOFTMAXES = (torch.softmax, nn.functional.softmax, Tensor.softmax)
_GATES = (torch.sigmoid, Tensor.sigmoid, nn.functional.softplus)
#: What modules call the input of their keys where it is not that of their queries.
_KEY_INPUTS = ("key_value_states", "encoder_hidden_states")


@dataclass
class Reading:
    """One product of attention weights and values, `(H, t, s)` and `(H, s, r_v)`, and what is made of it.

    `project` is the module that writes, and `given` what it is given, `(t, H·r_v)`; None until it runs.
    """

    weights: Float[Tensor, "heads t s"]
    value: Float[Tensor, "heads s value_rank"]
    project: nn.Module | None = None
    given: Float[Tensor, "t all_heads"] | None = None

    @property
    def heads(self) -> Float[Tensor, "heads t value_rank"]:
        """What every head has gathered."""
        return self.weights @ self.value

    def written(self, heads: Float[Tensor, "heads t value_rank"]) -> Float[Tensor, "heads t width"]:
        """What the model's projection makes of single heads: for each, the places of all others are zero."""
        assert self.project is not None
        count, tokens, rank = heads.shape
        alone = heads.new_zeros(count, tokens, count, rank)
        alone[range(count), :, range(count)] = heads
        with torch.no_grad():
            zero, *made = (_first(self.project(one.reshape(1, tokens, -1))) for one in (torch.zeros_like(alone[0]), *alone))
        return torch.cat([one - zero for one in made])


@dataclass
class Call:
    """One product of queries and keys, `(H, t, r)` and `(H, s, r)`, and the inputs `(t, d)` and `(s, d)` that they come from.

    `reading` is what the module did next with the softmax of that product, if that was a matrix product, and `logits` what that
    softmax was given. `outer` has what the modules around it were given, by their paths. `between` has what lies between values
    and outputs besides: a `gate`, a `norm`.
    """

    module: str
    query: Float[Tensor, "heads t rank"]
    key: Float[Tensor, "heads s rank"]
    x: Float[Tensor, "t hidden"]
    y: Float[Tensor, "s hidden"]
    reading: Reading | None = None
    logits: Float[Tensor, "heads t scores"] | None = None
    outer: dict[str, Tensor] = field(default_factory=dict)
    between: set[str] = field(default_factory=set)

    @property
    def layer(self) -> int | None:
        """The first number in the module's path."""
        number = re.search(r"\.(\d+)(\.|$)", self.module)
        return int(number[1]) if number else None

    @property
    def block(self) -> str:
        """The module's path up to that number: the block of layers that it is part of."""
        return re.sub(r"(?<=\.)(\d+)\..*", r"\1", self.module)


def scores_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Call]:
    """Run a model, and catch the products of every module that computes attention.

    Gates are open: where a module takes a sigmoid between its scores and its projection, it is one everywhere.
    """
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
            if _is_norm(norm):
                norm.forward = _gain(norm.weight) if name.endswith("_a_layernorm") else _same


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _first(result: Any) -> Any:
    """What a module returns, or the first of it."""
    return result[0] if isinstance(result, tuple) else result


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
    call: Call | None = None


class _Watch(TorchFunctionMode):
    """Catches, in every module of a model that runs, its first product of shape (tokens, tokens), and what follows it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._unwritten: Call | None = None
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
            self._writes(module, args)
            self._running.append(_Running(path, x if isinstance(x, Tensor) else None, y if isinstance(y, Tensor) else None))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _GATES and self._unwritten is not None:
            self._unwritten.between.add("gate")
            result = torch.ones_like(result)
        if func in _SOFTMAXES and self._running:
            self._softmax(self._running[-1].call, args[0])
        if func in _PRODUCTS and self._running:
            query, key = (kwargs["batch1"], kwargs["batch2"]) if kwargs and "batch1" in kwargs else args[-2:]
            self._product(self._running[-1], query, key, result)
        return result

    def _softmax(self, call: Call | None, given: Tensor) -> None:
        if call is not None and call.logits is None and given.shape[-2] == len(call.x):
            call.logits = given.double().reshape(-1, *given.shape[-2:])

    def _product(self, running: _Running, left: Tensor, right: Tensor, product: Tensor) -> None:
        x, y = running.x, running.y
        if x is None or y is None or x.dim() < 2:
            return
        scores = (x.shape[-2], y.shape[-2])
        if running.call is None and tuple(product.shape[-2:]) == scores:
            heads = _batch(product)
            running.call = Call(
                running.module,
                _per_head(left, heads),
                _per_head(right, heads).transpose(1, 2),
                x.double().reshape(-1, x.shape[-1]),
                y.double().reshape(-1, y.shape[-1]),
                outer={run.module: run.x.clone() for run in self._running[:-1] if run.x is not None},
            )
            self.calls.append(running.call)
            self._unwritten = running.call
        elif running.call is not None and running.call.reading is None and tuple(left.shape[-2:]) == scores:
            heads = _batch(product)
            running.call.reading = Reading(_per_head(left, heads), _per_head(right, heads))

    def _writes(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call, weight = self._unwritten, getattr(module, "weight", None)
        reading = call.reading if call else None
        if call is None or reading is None:
            return
        if _is_norm(module):
            call.between.add("norm")
        if not args or not isinstance(args[0], Tensor) or not isinstance(weight, Tensor) or weight.dim() != 2:
            return
        heads, _, rank = reading.value.shape
        if args[0].shape[-1] == heads * rank and args[0].numel() == reading.weights.shape[1] * heads * rank:
            reading.project, reading.given = module, args[0].double().reshape(-1, heads * rank)
            self._unwritten = None


def _batch(product: Tensor) -> int:
    return product.reshape(-1, *product.shape[-2:]).shape[0]


def _per_head(tensor: Tensor, heads: int) -> Float[Tensor, "heads rows columns"]:
    flat = tensor.reshape(-1, *tensor.shape[-2:]).double()
    return flat.repeat_interleave(heads // len(flat), 0)
