"""Every address that an interpreted kernel touches is checked against the tensors it was given.

A kernel gets tagged addresses: the upper 16 bits, which no address in user space needs, number
the tensor. Pointer arithmetic keeps them, so that an access which strays from one tensor into
another is noticed too. Addresses without a tag, such as those a kernel reads from a table of
pointers, may lie in any tensor of the launch or in one that `MemoryGuard.allow` named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.interpreter.bfloat16 import NAN_BITS
from tests.interpreter.replacement import replaced

_TAG_SHIFT = 48
_TAG_LIMIT = 1 << 15  # the sign bit stays free: kernels may hold addresses as int64
_ADDRESS_BITS = np.uint64((1 << _TAG_SHIFT) - 1)


class InvalidAccess(RuntimeError):
    """An access outside of the tensor that its pointer came from, or a misaligned one."""


@dataclass(frozen=True)
class Region:
    """The bytes of one tensor, all lengths in bytes.

    `run` is the length of the innermost stretch without a gap, `outer` the strides and extents of
    the axes around it, largest stride first.
    """

    name: str
    start: int
    end: int
    run: int
    outer: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str) -> Region:
        itemsize = tensor.element_size()
        axes = sorted(
            (stride * itemsize, size)
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            if size > 1 and stride
        )
        start = tensor.data_ptr()
        span = sum(stride * (size - 1) for stride, size in axes) + itemsize
        if not tensor.numel():
            span = 0
        run = itemsize
        while axes and axes[0][0] == run:
            run *= axes.pop(0)[1]
        below = run
        for stride, size in axes:
            if stride < below:  # elements overlap: no telling gaps from elements
                return cls(name, start, start + span, span, ())
            below = stride * size
        return cls(name, start, start + span, run, tuple(reversed(axes)))

    def outside(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return which accesses of `size` bytes at `addresses` (uint64) leave this tensor
        (bool)."""
        if self.end - self.start < size:
            return np.ones(addresses.shape, np.bool_)
        wrong = (addresses < np.uint64(self.start)) | (addresses > np.uint64(self.end - size))
        if self.outer:
            rest = addresses - np.uint64(self.start)
            for stride, extent in self.outer:
                wrong |= rest >= np.uint64(stride * extent)
                rest %= np.uint64(stride)
            wrong |= rest + np.uint64(size) > np.uint64(self.run)
        return wrong

    def holds(self, lowest: int, highest: int, size: int) -> bool:
        """Whether all accesses between two addresses are inside; False also means unknown."""
        return not self.outer and self.start <= lowest and highest + size <= self.end

    def distance(self, address: int, size: int) -> str:
        if address < self.start:
            return f"{self.start - address} bytes before the start"
        if address + size > self.end:
            return f"{address + size - self.end} bytes past the end"
        return f"{address - self.start} bytes after the start, between rows,"


class MemoryGuard:
    """Knows the tensors of the running launch; see `memory_guard`."""

    def __init__(self) -> None:
        self._arguments: list[Region] = []
        self._allowed: list[Region] = []

    def allow(self, tensor: torch.Tensor, name: str = "an allowed tensor") -> None:
        """Let kernels reach a tensor on the CPU through addresses that they read from memory."""
        self._allowed.append(Region.of(tensor, name))

    @contextlib.contextmanager
    def launch(self) -> Iterator[None]:
        """The scope of the arguments that `tagged_address` numbers."""
        try:
            yield
        finally:
            self._arguments = []

    def tagged_address(self, tensor: torch.Tensor, name: str) -> int:
        """Return the address of an argument's first element, with its number above bit 48."""
        self._arguments.append(Region.of(tensor, name))
        if len(self._arguments) >= _TAG_LIMIT:
            raise ValueError(f"a kernel with more than {_TAG_LIMIT - 1} tensors")
        return len(self._arguments) << _TAG_SHIFT | tensor.data_ptr()

    def check(
        self, access: str, addresses: np.ndarray, mask: np.ndarray | None, size: int
    ) -> np.ndarray:
        """Return the untagged `addresses` (uint64, any shape), once those under `mask` are known
        good.

        Raises `InvalidAccess` if an `access` ("load", …) of `size` bytes leaves its tensor, or is
        not aligned to its size.
        """
        plain = addresses & _ADDRESS_BITS
        if mask is None or mask.all():
            active = addresses.reshape(-1)
        else:
            active = addresses[np.broadcast_to(mask, addresses.shape)]
        if not active.size:
            return plain
        lowest, highest = int(active.min()), int(active.max())
        tag = lowest >> _TAG_SHIFT
        if not (tag and tag == highest >> _TAG_SHIFT and self._holds(tag, lowest, highest, size)):
            for tag in np.unique(active >> np.uint64(_TAG_SHIFT)):
                of_tag = active[active >> np.uint64(_TAG_SHIFT) == tag] & _ADDRESS_BITS
                self._check_tag(access, int(tag), of_tag, size)
        if size > 1 and int(np.bitwise_or.reduce(active)) & (size - 1):
            wrong = active[(active & np.uint64(size - 1)) != 0][0] & _ADDRESS_BITS
            raise InvalidAccess(
                f"{access} of {size} bytes at {int(wrong):#x}, which is not a multiple of {size}"
            )
        return plain

    def _holds(self, tag: int, lowest: int, highest: int, size: int) -> bool:
        base = tag << _TAG_SHIFT
        return tag <= len(self._arguments) and self._arguments[tag - 1].holds(
            lowest - base, highest - base, size
        )

    def _check_tag(self, access: str, tag: int, addresses: np.ndarray, size: int) -> None:
        if tag > len(self._arguments):
            raise InvalidAccess(
                f"{access} of {size} bytes at {int(addresses[0]):#x} with the tag "
                f"{tag}: no pointer argument plus an offset gives this address"
            )
        regions = self._arguments[tag - 1 : tag] if tag else self._arguments + self._allowed
        wrong = np.ones(addresses.shape, np.bool_)
        for region in regions:
            wrong &= region.outside(addresses, size)
        if wrong.any():
            address = int(addresses[wrong][0])
            where = " and ".join(f"{r.distance(address, size)} of {r.name}" for r in regions)
            raise InvalidAccess(
                f"{access} of {size} bytes at {address:#x} is {where or 'nowhere'};"
                f" {int(wrong.sum())} of {addresses.size} accesses are outside"
            )


def _poison(dtype: tl.dtype) -> Any:
    """Return what a masked-off element of a load without `other` holds: as `torch.empty` in the
    tests."""
    numpy_dtype = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        return NAN_BITS
    if numpy_dtype.kind == "f":
        return numpy_dtype.type(np.nan)
    return numpy_dtype.type(True if numpy_dtype.kind == "b" else np.iinfo(numpy_dtype).max)


@contextlib.contextmanager
def memory_guard() -> Iterator[MemoryGuard]:
    """While active, loads, stores and atomics, those of descriptors included, are checked.

    Masked-off elements of loads without `other`, which Triton leaves undefined, are NaN or the
    largest integer. Descriptors that pad with NaN do so for bfloat16 as well.
    """
    guard = MemoryGuard()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    cas, rmw = InterpreterBuilder.create_atomic_cas, InterpreterBuilder.create_atomic_rmw
    descriptor_load = InterpreterBuilder.create_descriptor_load

    def plain(
        access: str, pointer: TensorHandle, mask: TensorHandle | None, of: tl.dtype
    ) -> TensorHandle:
        size = interpreter._get_np_dtype(of).itemsize
        mask_data = None if mask is None else mask.data
        return TensorHandle(guard.check(access, pointer.data, mask_data, size), pointer.dtype)

    def guarded_load(builder: Any, pointer: Any, mask: Any, other: Any, *rest: Any, **named: Any):
        element = pointer.get_element_ty()
        pointer = plain("load", pointer, mask, element)
        if other is None and not mask.data.all():
            numpy_dtype = interpreter._get_np_dtype(element)
            other = TensorHandle(
                np.full(pointer.data.shape, _poison(element), numpy_dtype), element
            )
        return load(builder, pointer, mask, other, *rest, **named)

    def guarded_store(builder: Any, pointer: Any, value: Any, mask: Any, policy: Any):
        return store(
            builder, plain("store", pointer, mask, pointer.get_element_ty()), value, mask, policy
        )

    def guarded_cas(builder: Any, pointer: Any, expected: Any, value: Any, *rest: Any):
        pointer = plain("atomic", pointer, None, value.dtype.scalar)
        return cas(builder, pointer, expected, value, *rest)

    def guarded_rmw(builder: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any):
        pointer = plain("atomic", pointer, mask, value.dtype.scalar)
        return rmw(builder, operation, pointer, value, mask, *rest)

    def padded_load(builder: Any, descriptor: Any, indices: Any, policy: Any):
        element = descriptor.base.dtype.element_ty
        if descriptor.padding != ir.PADDING_OPTION.PAD_NAN or element != tl.bfloat16:
            return descriptor_load(builder, descriptor, indices, policy)
        pointers, mask = descriptor.materialize_pointers(indices)
        other = TensorHandle(np.full(pointers.data.shape, NAN_BITS), element)
        return builder.create_masked_load(pointers, mask, other, policy, False)

    with replaced(
        InterpreterBuilder,
        create_masked_load=guarded_load,
        create_masked_store=guarded_store,
        create_atomic_cas=guarded_cas,
        create_atomic_rmw=guarded_rmw,
        create_descriptor_load=padded_load,
    ):
        yield guard
