"""Catches what attention computes while a model runs.

The models' code stays as it is. Hooks tell which module runs and what it is given. A torch function mode sees matrix products:

- The first product of shape (tokens, tokens) in a module is its scores.
- The next product with such a matrix on its left is its reading of values.
- The next module whose weight takes all heads side by side is the one that writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headgram.proofs.calls import Attended, Call, first_of
from headgram.proofs.neutral import is_norm
from headgram.proofs.products import as_product, flat, of_same_numbers, per_head, rows, sequences

_PRODUCTS = (torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm)
_SUMS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__)
_SOFTMAXES = (torch.softmax, nn.functional.softmax, Tensor.softmax)
_GATES = (torch.sigmoid, Tensor.sigmoid, nn.functional.softplus)
_TIMES = (torch.mul, Tensor.mul, Tensor.__mul__)
_SINES, _COSINES = (torch.sin, Tensor.sin), (torch.cos, Tensor.cos)
#: Names of the arguments from which modules make queries; keys, if from another argument; values, if from yet another.
_QUERY_INPUTS = ("hidden_states", "hidden_state", "query", "query_states", "query_tensor", "from_tensor")
_KEY_INPUTS = (
    "key_value_states",
    "encoder_hidden_states",
    "key",
    "key_states",
    "key_tensor",
    "current_states",
    "to_tensor",
    "context",
)
_VALUE_INPUTS = ("value", "value_states", "value_tensor")


def scores_of(model: nn.Module, inputs: Mapping[str, Tensor], still: bool = False) -> list[Call]:
    """Run a model, and catch the products of every module that computes attention.

    Gates are open: where a module takes a sigmoid between its scores and its projection, it is one everywhere. With `still`,
    rotary encodings are the identity, wherever tokens sit.
    """
    with torch.no_grad(), Watch(model, still) as watch:
        model(**inputs)
    return watch.calls


def _memory(x: Tensor | None) -> int | None:
    """Where a tensor's numbers begin, whatever its shape."""
    return None if x is None else x.data_ptr()


def _named(given: Mapping[str, Any], names: tuple[str, ...], other: Tensor | None) -> Tensor | None:
    """The first tensor under one of the names."""
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), other)


@dataclass
class _Running:
    """A module whose `forward` is under way, with what its queries and its keys are made of."""

    module: str
    tokens: Tensor | None
    x: Tensor | None
    y: Tensor | None
    z: Tensor | None
    given: frozenset[int | None]  # where its arguments' numbers begin
    placed: bool = False  # it has added some of its arguments to x or y
    call: Call | None = None
    columns: Tensor | None = None  # which columns of its products are tokens, and neither padding nor others


class Watch(TorchFunctionMode):
    """Catches, in every module of a model that runs, its first product of shape (tokens, tokens), and what follows it."""

    def __init__(self, model: nn.Module, still: bool = False) -> None:
        super().__init__()
        self._still = still  # rotary encodings are the identity, wherever tokens sit
        self._unwritten: Call | None = None
        self._unadded: Call | None = None
        self._left: dict[str, Tensor] = {}
        self._latest: Tensor | None = None
        self._normed: list[Tensor] = []
        self.calls: list[Call] = []
        self._model = model
        self._weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self._running: list[_Running] = []
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for path, module in self._model.named_modules():
            for hook in (
                module.register_forward_pre_hook(self._enters(path), with_kwargs=True),
                module.register_forward_hook(self._leaves),
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
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            x = _named(given, _QUERY_INPUTS, first)
            y = _named(given, _KEY_INPUTS, x)
            self._writes(module, args)
            arguments = frozenset(_memory(value) for value in given.values() if isinstance(value, Tensor))
            self._running.append(_Running(path, x, x, y, _named(given, _VALUE_INPUTS, y), arguments))

        return hook

    def _leaves(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        running, made = self._running.pop(), first_of(result)
        if not isinstance(made, Tensor):
            return
        self._left[running.module] = self._latest = made
        if is_norm(module):
            self._normed.append(made)
        last = self.calls[-1] if self.calls else None
        projects = last is not None and last.reading is not None and last.reading.project is module
        call = last if projects else running.call
        if call is not None and (projects or call.written is None):
            call.written, self._unadded = made, call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention and self._running:
            return self._attention(*args, **(kwargs or {}))
        if func is nn.functional.multi_head_attention_forward and self._running:
            return self._multi_head(*args, **(kwargs or {}))
        if func in _TIMES and isinstance(args[-1], float) and args[-1] == torch.finfo(torch.float64).min:
            args = (args[0].double(), args[-1])  # a mask in float32, which has no such number: zero times infinity
        result = func(*args, **(kwargs or {}))
        if self._still and func in _SINES + _COSINES:
            return torch.zeros_like(result) if func in _SINES else torch.ones_like(result)
        if self._still and func is torch.polar:
            return torch.ones_like(result)
        if func in _GATES and self._unwritten is not None:
            self._unwritten.between.add("gate")
            result = torch.ones_like(result)
        if func in _SUMS and self._running:
            self._places(self._running[-1], args, result)
        if func in _SUMS and self._unadded is not None:
            self._adds(self._unadded, args)
        if func in _SOFTMAXES and self._running:
            self._softmax(self._running[-1].call, args[0])
        if func in _PRODUCTS and self._running:
            query, key = (kwargs["batch1"], kwargs["batch2"]) if kwargs and "batch1" in kwargs else args[-2:]
            self._product(self._running[-1], query, key, result)
        if func is torch.einsum and self._running and (factors := as_product(*flat(args), result)):
            self._product(self._running[-1], *factors)
        return result

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **rest: Any
    ) -> Tensor:
        """torch's own attention, in two products that can be watched."""
        if rest.get("enable_gqa"):
            key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
        scores: Tensor = query @ key.transpose(-1, -2)
        self._product(self._running[-1], query, key.transpose(-1, -2), scores)
        scale = rest.get("scale")
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1)
        result: Tensor = weights @ value
        self._product(self._running[-1], weights, value, result)
        return result

    def _multi_head(self, query: Tensor, key: Tensor, value: Tensor, _: int, heads: int, *rest: Any, **named: Any) -> Any:
        """torch's own module, `(t, 1, d)` in, step by step, without masks."""
        fused, _, _, _, _, _, output, bias = rest[:8]
        separate = named.get("use_separate_proj_weight")
        weights = [named[f"{one}_proj_weight"] for one in "qkv"] if separate else fused.chunk(3)
        q, k, v = (
            (x @ weight.t()).reshape(len(x), -1, heads, weight.shape[0] // heads).permute(1, 2, 0, 3)
            for x, weight in zip((query, key, value), weights, strict=True)
        )
        made = self._attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
        running = self._running[-1]
        inner = self._model.get_submodule(running.module)
        project = next(module for module in inner.modules() if getattr(module, "weight", None) is output)
        self._writes(project, (made.transpose(0, 1),))
        return made @ output.t() + (0 if bias is None else bias), None

    def _softmax(self, call: Call | None, given: Tensor) -> None:
        if call is not None and call.logits is None and given.shape[-2] == len(call.x):
            given = given if self._running[-1].columns is None else given[..., self._running[-1].columns]
            call.logits = given.double().reshape(-1, *given.shape[-2:])

    def _places(self, running: _Running, summands: tuple[Any, ...], result: Tensor) -> None:
        """What a module is given beside its tokens and adds to them, before any product, stands for their places."""
        if running.call is not None or not all(isinstance(one, Tensor) and one.shape == result.shape for one in summands[:2]):
            return
        tokens, place = (_memory(one) for one in summands[:2])
        if tokens == place or place not in running.given:
            return
        queries, keys = tokens == _memory(running.x), tokens == _memory(running.y)
        running.x, running.y = result if queries else running.x, result if keys else running.y
        running.placed |= queries or keys

    def _adds(self, call: Call, summands: tuple[Any, ...]) -> None:
        """The first sum of this size adds what the heads write, or what the last module made of it, to their stream."""
        before = call.outer.get(call.block)
        written, latest = call.written, self._latest
        assert written is not None
        assert latest is not None
        if not all(
            isinstance(one, Tensor) and one.shape[-1:] == written.shape[-1:] and one.numel() == written.numel()
            for one in summands[:2]
        ):
            return
        orders = (summands[:2], summands[1::-1])

        def same(one: Tensor, other: Tensor | None) -> bool:
            return other is not None and torch.equal(one.flatten(), other.flatten())

        with torch._C.DisableTorchFunction():  # in parallel blocks the last module is another one
            found = [order for order in orders if same(order[0], written)] or [
                order for order in orders if same(order[1], before)
            ]
            found = found or [order for order in orders if same(order[0], latest)]
        if found:
            call.added, call.stream = found[0]
        self._unadded = None

    def _product(self, running: _Running, left: Tensor, right: Tensor, product: Tensor) -> None:
        x, y, z = running.x, running.y, running.z
        if x is None or y is None or z is None or x.dim() < 2 or y.dim() < 2:
            return
        batch = sequences(x)
        heads = product[..., 0, 0].numel() // batch  # of several sequences, the first is looked at
        both = (x.shape[-2], x.shape[-2] + y.shape[-2])
        apart = y is not x and y is z and not running.placed
        if running.call is None and apart and product.shape[-2:] == both and x.shape[:-2] == y.shape[:-2]:
            running.y = running.z = y = z = torch.cat([y, x], -2)  # tokens of a context before the own ones
        scores = (x[..., 0].numel() // batch, y[..., 0].numel() // batch)
        others = None
        if (
            running.call is None
            and product.shape[-2] == scores[0]
            and product.shape[-1] > scores[1]
            and not self._is_weight(right)
        ):
            tokens = right.abs().flatten(0, -2).amax(0) > 0
            running.columns = tokens & (tokens.cumsum(0) <= scores[1])  # sums over blocks of tokens stand last
            right, product = right[..., running.columns], product[..., running.columns]
            running.columns = running.columns if product.shape[-1] == scores[1] else None
        elif running.columns is not None and left.shape[-1] == len(running.columns):
            others = left[..., ~running.columns] @ right[..., ~running.columns, :]
            left, right = left[..., running.columns], right[..., running.columns, :]
        if running.call is None and tuple(product.shape[-2:]) == scores and heads:
            running.call = Call(
                running.module,
                per_head(left, heads),
                per_head(right, heads).transpose(1, 2),
                rows(x, scores[0]),
                rows(y, scores[1]),
                rows(z, scores[1]),
                outer={run.module: run.tokens.clone() for run in self._running[:-1] if run.tokens is not None},
                placed=running.placed,
            )
            stack = running.call.block.rpartition(".")[0]
            before = [call.block for call in self.calls if call.block.rpartition(".")[0] != stack]
            running.call.source = self._left.get(before[-1]) if before else None
            self.calls.append(running.call)
            self._unwritten = running.call
        elif running.call is not None and running.call.reading is None and tuple(left.shape[-2:]) == scores and heads:
            others = None if others is None else per_head(others, heads)
            running.call.reading = Attended(per_head(left, heads), per_head(right, heads), others)
            if any(made.shape[-1] == right.shape[-1] and of_same_numbers(made, right) for made in self._normed):
                running.call.between.add("norm of values")
            self._normed = []

    def _is_weight(self, factor: Tensor) -> bool:
        return factor.untyped_storage().data_ptr() in self._weights

    def _writes(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call, weight = self._unwritten, getattr(module, "weight", None)
        reading = call.reading if call else None
        if call is None or reading is None:
            return
        if is_norm(module):
            call.between.add("norm")
        if not args or not isinstance(args[0], Tensor) or not isinstance(weight, Tensor) or weight.dim() != 2:
            return
        with torch._C.DisableTorchFunction():  # this product is ours
            heads_by_side = reading.side_by_side
        heads, tokens, rank = *reading.weights.shape[:2], reading.value.shape[-1]
        if args[0].shape[-1] in (heads * rank, 2 * heads * rank) and args[0].numel() % (tokens * heads * rank) == 0:
            # What else it is given stands behind.
            given = args[0].double().reshape(-1, args[0].shape[-1])[:tokens, : heads * rank]
            right = bool((given - heads_by_side).abs().max() <= 1e-5 * given.abs().max())
            if right or reading.project is None:  # a gate's own projection may come first
                reading.project, reading.given = module, given
            if right:
                self._unwritten = None
