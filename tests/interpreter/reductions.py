"""Reductions and scans of 16-bit floats in Triton's interpreter, and the dot product.

A GPU adds 16-bit values in 16 bits and rounds every partial sum, in a tree over threads;
numpy accumulates float16 in float32, and Triton's interpreter adds the bits of bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

from tests.interpreter.bfloat16 import decode, encode, is_bfloat16
from tests.interpreter.replacement import replaced

_UPSTREAM_SUM = ReduceOps.sum
_UPSTREAM_MIN_MAX = ReduceOps.min_max
_UPSTREAM_CUMSUM = ScanOps.cumsum
_UPSTREAM_CUMPROD = ScanOps.cumprod
_UPSTREAM_DOT = InterpreterBuilder.create_dot

_TF32_DIGITS = np.uint32(0xFFFFE000)


def tree_sum(values: np.ndarray, axis: int, dtype: tl.dtype) -> np.ndarray:
    """Sum over `axis`, halving it again and again and rounding each partial sum.

    `values` are float16, or the bits of bfloat16; the extent of `axis` is a power of two. The
    result has the same dtype and lacks `axis`.
    """
    values = np.moveaxis(values, axis, 0)
    while len(values) > 1:
        upper, lower = np.split(values, 2)
        values = encode(decode(upper) + decode(lower)) if dtype == tl.bfloat16 else upper + lower
    return values[0]


def _sum(self: Any, operand: Any) -> Any:
    if operand.dtype not in (tl.bfloat16, tl.float16):
        return _UPSTREAM_SUM(self, operand)
    data = operand.handle.data
    if self.axis is None:
        total = tree_sum(data.reshape(-1), 0, operand.dtype)
        if self.keep_dims:
            total = total.reshape((1,) * data.ndim)
    else:
        total = tree_sum(data, self.axis, operand.dtype)
        if self.keep_dims:
            total = np.expand_dims(total, self.axis)
    return self.to_tensor(total, operand.dtype)


def _min_max(self: Any, operand: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    operand = operand[0] if isinstance(operand, tuple) else operand
    if operand.dtype != tl.bfloat16:
        return _UPSTREAM_MIN_MAX(self, operand, val_reduce_op, idx_reduce_op)
    wide = self.to_tensor(decode(operand.handle.data), tl.float32)
    result: Any = _UPSTREAM_MIN_MAX(self, wide, val_reduce_op, idx_reduce_op)
    if not val_reduce_op:
        return result
    value = result[0] if idx_reduce_op else result
    narrow = self.to_tensor(encode(value.handle.data), tl.bfloat16)
    if not value.shape:
        narrow = tl.tensor(narrow.handle, tl.bfloat16)
    return (narrow, result[1]) if idx_reduce_op else narrow


def _scan(
    self: Any, operand: Any, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[Any]:
    """Combine bfloat16 values along `self.axis`, rounded at each step."""
    steps = np.moveaxis(operand.handle.data.copy(), self.axis, 0)
    for position in range(1, len(steps)):
        running = combine(decode(steps[position - 1]), decode(steps[position]))
        steps[position] = encode(running)
    return [self.to_tensor(np.moveaxis(steps, 0, self.axis), operand.dtype)]


def _cumsum(self: Any, operand: Any) -> list[Any]:
    if operand.dtype == tl.bfloat16:
        return _scan(self, operand, np.add)
    return _UPSTREAM_CUMSUM(self, operand)


def _cumprod(self: Any, operand: Any) -> list[Any]:
    if operand.dtype == tl.bfloat16:
        return _scan(self, operand, np.multiply)
    return _UPSTREAM_CUMPROD(self, operand)


def _dot_operand(handle: TensorHandle, precision: Any) -> TensorHandle:
    if is_bfloat16(handle):
        return TensorHandle(decode(handle.data), tl.float32)
    if handle.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32:
        # mma.sync takes float32 registers as they are and ignores the low 13 bits.
        words = np.ascontiguousarray(handle.data).view(np.uint32) & _TF32_DIGITS
        return TensorHandle(words.view(np.float32), tl.float32)
    return handle


def _dot(
    builder: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: int
) -> TensorHandle:
    a, b = _dot_operand(a, precision), _dot_operand(b, precision)
    if d.data.dtype == np.float32 and a.data.dtype == np.float16:
        # Widened here, numpy hands the product to BLAS.
        a = TensorHandle(a.data.astype(np.float32), tl.float32)
        b = TensorHandle(b.data.astype(np.float32), tl.float32)
    return _UPSTREAM_DOT(builder, a, b, d, precision, imprecise)


@contextlib.contextmanager
def sixteen_bit_reductions() -> Iterator[None]:
    """While active, sums, scans, extrema and dot products of 16-bit floats are right.

    So is `tl.dot` of float32: in the default precision "tf32" operands lose 13 digits, as on a
    GPU; "ieee" and "tf32x3" are computed in float32.
    """
    with (
        replaced(ReduceOps, sum=_sum, min_max=_min_max),
        replaced(ScanOps, cumsum=_cumsum, cumprod=_cumprod),
        replaced(InterpreterBuilder, create_dot=_dot),
    ):
        yield
