"""A pretended GPU over CPU memory, for tests of GPU code on machines without one. It is stricter than a real one.

    with StandIn(memory=2**20) as device:
        x = torch.randn(3, 4).to("cuda")        # is on `cuda:0`, as far as Python can tell

Every operation on such a tensor is computed by the CPU, and looked at: tensors of both sides do not mix, memory has a limit,
float32 products must not be allowed to take TF32. What a real device makes its caller wait for is counted (`waits`), as are
launches, copies either way and the operations of products by precision. An error may be raised as a real device raises it: not by
the operation that failed, but by the next that waits, and by each one after that.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HERE = torch.device("cuda", 0)
aten = torch.ops.aten
#: What a real device answers only when it has computed: a value or a size on which the caller goes on; solvers that look at
#: whether they converged.
WAITING = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive),
    *(aten.unique_dim, aten._linalg_eigh, aten._linalg_svd),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.dot, aten.addmv}
#: Bytes that an allocator rounds up to.
GRAIN = 512


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same arguments or results, each changed."""
    if isinstance(value, list | tuple):
        changed = [_each(item, change) for item in value]
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {name: _each(item, change) for name, item in value.items()}
    return change(value)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(value, lambda item: found.append(item) if isinstance(item, Tensor) else None)
    return found


def _is_device(value: object) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "cuda"


class OnDevice(Tensor):
    """A tensor of a stand-in: `inner` holds what it holds."""

    inner: Tensor
    home: StandIn
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, home: StandIn) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="cpu"
        )
        self.inner, self.home, self.allocation = inner, home, home.allocated(inner)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs or {}))
        home = next(value for value in given if isinstance(value, OnDevice)).home
        return home.launched(func, given, args, kwargs or {})

    device = property(lambda self: HERE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        places = [value for value in (*args, *kwargs.values()) if isinstance(value, str | torch.device)]
        if not places or _is_device(places[0]):
            args, kwargs = _each((args, kwargs), lambda value: "cpu" if _is_device(value) else value)
            return super().to(*args, **kwargs)
        return self.home.to_host(self).to(*args, **kwargs)

    def cpu(self) -> Tensor:
        return self.home.to_host(self)

    def cuda(self) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"


class StandIn(TorchFunctionMode):
    """The device, in use for the length of a `with` block.

    Attributes
    ----------
    launches, waits, copies_in, copies_out
        How many there were. A copy out is a wait too; views launch nothing.
    bytes_in, bytes_out
        What was copied: in the precision asked for, since a copy that converts is converted before it goes to a device.
    flops
        Operations of matrix products, by precision: `(of the factors, of the result)`.
    held, peak
        Bytes of memory, now and at most.
    """

    def __init__(self, memory: float = float("inf")) -> None:
        super().__init__()
        self.memory = memory
        self.held = self.peak = self.released = 0
        self._allocations: weakref.WeakValueDictionary[int, _Allocation] = weakref.WeakValueDictionary()
        self._failing: tuple[int, Exception] | None = None
        self._warns = False
        self._patches = contextlib.ExitStack()
        self.reset()

    def reset(self) -> None:
        """Count from 0 again."""
        self.launches = self.waits = self.copies_in = self.copies_out = self.bytes_in = self.bytes_out = 0
        self.peak = self.held
        self.flops: Counter[tuple[torch.dtype, torch.dtype]] = Counter()

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("launches", "waits", "copies_in", "copies_out")}

    def fail(self, error: Exception, after: int = 1) -> None:
        """Let one of the coming launches fail, which is found out at the next wait."""
        self._failing = self.launches + after, error

    def __enter__(self) -> StandIn:
        for name, stand_in in self._cuda().items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _cuda(self) -> dict[str, Any]:
        """What `torch.cuda` is asked here and in the tests that run on a real GPU."""
        return {
            "is_available": lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != "",
            "empty_cache": lambda: setattr(self, "released", self.released + 1),
            "synchronize": self.waited,
            "current_device": lambda: 0,
            "memory_reserved": lambda: self.held,
            "get_device_properties": lambda _: SimpleNamespace(total_memory=2**36),
            "set_per_process_memory_fraction": lambda share: setattr(self, "memory", share * 2**36),
            "set_sync_debug_mode": lambda mode: setattr(self, "_warns", mode == "warn"),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever makes a tensor on the device, or moves one of the CPU to it."""
        kwargs = kwargs or {}
        moves = func in (Tensor.to, Tensor.cuda)
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], "cuda")
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):  # where, and as precise as, another lies
            args = (args[0], args[1].device, args[1].dtype)
        if not _is_device(kwargs.get("device")) and not (moves and any(map(_is_device, args[1:]))):
            return func(*args, **kwargs)
        args, kwargs = _each((args, kwargs), lambda value: "cpu" if _is_device(value) else value)
        made = func(*args, **kwargs)
        if isinstance(made, OnDevice):
            return made
        if moves or func in (torch.tensor, torch.as_tensor):
            self.copies_in += 1
            self.bytes_in += made.nbytes
            made = made.clone(memory_format=torch.preserve_format)
        else:
            self._launch()
        return OnDevice(made, self)

    def to_host(self, tensor: OnDevice) -> Tensor:
        """A copy of what a tensor of the device holds."""
        self.waited()
        self.copies_out += 1
        self.bytes_out += tensor.inner.nbytes
        return tensor.inner.clone(memory_format=torch.preserve_format)

    def launched(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """The result of an operation on tensors of which at least one is on the device."""
        if any(not isinstance(value, OnDevice) and value.ndim for value in given):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
            )
        args, kwargs = _each((args, kwargs), lambda value: value.inner if isinstance(value, OnDevice) else value)
        if func is aten._conj.default:  # a mark on a tensor, which torch overlooks where tensors are wrapped
            func = aten.conj_physical.default
        operation = func.overloadpacket
        if operation in PRODUCTS:
            self._count_product(func, args)
        result = _bmm(func, *args, **kwargs) if func in (aten.bmm.dtype, aten.bmm.dtype_out) else func(*args, **kwargs)
        if not func.is_view:
            self._launch()
        masked = operation in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if operation in WAITING or masked:
            self.waited()
        same = {id(value.inner): value for value in given if isinstance(value, OnDevice)}  # what is changed in place
        return _each(result, lambda value: same[id(value)] if id(value) in same else self._wrapped(value))

    def _wrapped(self, value: Any) -> Any:
        return OnDevice(value, self) if isinstance(value, Tensor) else value

    def _launch(self) -> None:
        self.launches += 1

    def waited(self) -> None:
        """The caller waits; what failed meanwhile is raised, now and ever after."""
        self.waits += 1
        if self._warns:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        if self._failing and self.launches >= self._failing[0]:
            raise self._failing[1]

    def _count_product(self, func: Any, args: Any) -> None:
        a, b = [value for value in args if isinstance(value, Tensor)][-2:]
        result = torch.float32 if func in (aten.bmm.dtype, aten.bmm.dtype_out) else a.dtype
        columns = b.shape[-1] if b.ndim > 1 else 1
        self.flops[a.dtype, result] += 2 * a.numel() * columns
        if a.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision not in ("ieee", "none"):
            raise AssertionError(f"{func} of float32 may take TF32 here")

    def allocated(self, inner: Tensor) -> _Allocation | None:
        """The memory of a tensor, which views share.

        Raises
        ------
        torch.OutOfMemoryError
            If there is less.
        """
        storage = inner.untyped_storage()
        if not storage.nbytes():
            return None
        allocation = self._allocations.get(storage.data_ptr())
        if allocation is None:
            allocation = self._allocations[storage.data_ptr()] = _Allocation(self, -(-storage.nbytes() // GRAIN) * GRAIN)
        return allocation


class _Allocation:
    def __init__(self, home: StandIn, size: int) -> None:
        self._home, self._size = home, 0
        if home.held + size > home.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.\nGPU 0 holds {home.held} bytes.")
        self._size = size
        home.held += size
        home.peak = max(home.peak, home.held)

    def __del__(self) -> None:
        self._home.held -= self._size


def _bmm(func: Any, a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A product of bfloat16 with float32 results, which a CPU has no routine for."""
    assert a.dtype == b.dtype == torch.bfloat16, func
    assert dtype == torch.float32, func
    return torch.bmm(a.float(), b.float(), out=out)
