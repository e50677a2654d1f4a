"""bfloat16 in Triton's interpreter, which stores its bits as uint16 and computes on those bits.

Every operation here decodes to float32, which holds each bfloat16 exactly, computes there and
rounds to nearest even. For +, - and × that equals rounding the exact result once, because float32
has more than twice the digits of bfloat16. NaNs become 0x7FFF, as on NVIDIA GPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import interpreter as native  # pyright: ignore[reportMissingImports]
from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.interpreter.replacement import replaced

NAN_BITS = np.uint16(0x7FFF)
_UPSTREAM = InterpreterBuilder


def decode(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits (uint16, any shape); exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bits (uint16) nearest to `values` (float32 or float64), ties to even."""
    if values.dtype == np.float64:
        values = _to_odd_float32(values)
    words = np.ascontiguousarray(values).view(np.uint32)
    rounded = words + (((words >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    bits = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        bits[nan] = NAN_BITS
    return bits.reshape(values.shape)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return bits of a × b + c rounded once; all three are bfloat16 bits (uint16) that
    broadcast."""
    product = decode(a).astype(np.float64) * decode(b)  # exact: 16 digits, exponents within ±266
    addend = np.broadcast_to(decode(c).astype(np.float64), np.broadcast(product, c).shape)
    total = product + addend
    # Knuth's two-sum: the part of the sum that float64 lost decides between ties below.
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    return encode(_nudge_to_odd(total, lost))


def toward_zero(values: np.ndarray, rounded: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return `words`, the bits of `rounded` (`values` to nearest), lowered by one where it grew."""
    return np.where(np.abs(rounded.astype(values.dtype)) > np.abs(values), words - 1, words)


def _to_odd_float32(values: np.ndarray) -> np.ndarray:
    """Convert float64 to float32, inexact results to the neighbour whose last digit is odd.

    Rounding that once more to bfloat16 equals rounding `values` once.
    """
    narrow = values.astype(np.float32)
    return _nudge_to_odd(narrow, values - narrow)


def _nudge_to_odd(rounded: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Return `rounded`, moved to its neighbour where it lost something and ends in an even
    digit."""
    words = rounded.view(np.dtype(f"u{rounded.dtype.itemsize}"))
    inexact = (lost != 0) & ~np.isnan(lost) & ((words & 1) == 0)
    side = np.where(lost > 0, np.inf, -np.inf).astype(rounded.dtype)
    return np.where(inexact, np.nextafter(rounded, side), rounded)


def is_bfloat16(handle: TensorHandle) -> bool:
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _cast(builder: Any, source: TensorHandle, target: Any) -> TensorHandle:
    from_type, to_type = source.dtype.scalar, target.scalar
    if from_type != to_type:
        if to_type == tl.bfloat16:
            wide = np.float64 if source.data.dtype == np.float64 else np.float32
            return TensorHandle(encode(source.data.astype(wide)), tl.bfloat16)
        if from_type == tl.bfloat16:
            values = decode(source.data).astype(interpreter._get_np_dtype(to_type))
            return TensorHandle(values, to_type)
    return _UPSTREAM_CAST(builder, source, target)


def _float_to_float(builder: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
    """Cast between floating types: bf16 <-> fp16, fp8, and casts with a rounding mode."""
    known = (tl.bfloat16, tl.float16, tl.float32, tl.float64)
    if source.dtype.scalar not in known or target.scalar not in known:
        return _UPSTREAM_FLOAT_TO_FLOAT(builder, source, target, rounding)
    nearest = _cast(builder, source, target)
    if rounding != ir.ROUNDING_MODE.RTZ:
        return nearest
    values = decode(source.data) if is_bfloat16(source) else source.data
    rounded = decode(nearest.data) if is_bfloat16(nearest) else nearest.data
    words = nearest.data.view(np.dtype(f"u{nearest.data.itemsize}"))
    lowered = toward_zero(values, rounded, words)
    return TensorHandle(lowered.astype(words.dtype).view(nearest.data.dtype), target.scalar)


def _binary(
    builder: Any, left: TensorHandle, right: TensorHandle, op: Callable[..., np.ndarray]
) -> TensorHandle:
    if is_bfloat16(left):
        result = op(decode(left.data), decode(right.data))
        if result.dtype != np.bool_:
            return TensorHandle(encode(result), tl.bfloat16)
    else:
        handle = _UPSTREAM_BINARY(builder, left, right, op)
        if handle.data.dtype != np.bool_:
            return handle
        result = handle.data
    # Upstream labels a comparison with the type that was compared.
    return TensorHandle(result, tl.int1)


def _ternary(
    builder: Any, first: TensorHandle, second: TensorHandle, third: TensorHandle, op: Any
) -> TensorHandle:
    if op is not np.where and is_bfloat16(third):
        result = op(decode(first.data), decode(second.data), decode(third.data))
        return TensorHandle(encode(result), tl.bfloat16)
    return _UPSTREAM_TERNARY(builder, first, second, third, op)


def _unary(builder: Any, operand: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
    if is_bfloat16(operand):
        return TensorHandle(encode(op(decode(operand.data))), tl.bfloat16)
    return _UPSTREAM_UNARY(builder, operand, op)


def _fma(builder: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if is_bfloat16(z):
        return TensorHandle(multiply_add(x.data, y.data, z.data), tl.bfloat16)
    return _UPSTREAM_FMA(builder, x, y, z)


def _atomic_rmw(
    builder: Any,
    operation: Any,
    pointer: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle,
    semantics: Any,
    scope: Any,
) -> TensorHandle:
    if not is_bfloat16(value):
        return _UPSTREAM_ATOMIC(builder, operation, pointer, value, mask, semantics, scope)
    if operation != ir.ATOMIC_OP.FADD:
        raise ValueError(f"{operation} of bf16 is not emulated, only atomic_add")
    old = np.zeros(pointer.data.shape, np.uint16)
    waiting = np.broadcast_to(mask.data, old.shape).ravel().copy()
    addresses, addends = pointer.data.ravel(), value.data.ravel()
    # One turn for each time that an address comes up again.
    while waiting.any():
        indices = np.flatnonzero(waiting)
        first = indices[np.unique(addresses[indices], return_index=True)[1]]
        everywhere = np.ones(first.shape, np.bool_)
        here = native.load(addresses[first], everywhere, old.ravel()[first], np.dtype(np.uint16))
        total = encode(decode(here) + decode(addends[first]))
        native.store(addresses[first], total, everywhere)
        old.reshape(-1)[first] = here
        waiting[first] = False
    return TensorHandle(old, tl.bfloat16)


_UPSTREAM_CAST = _UPSTREAM.cast_impl
_UPSTREAM_FLOAT_TO_FLOAT = _UPSTREAM.create_fp_to_fp
_UPSTREAM_BINARY = _UPSTREAM.binary_op
_UPSTREAM_TERNARY = _UPSTREAM.ternary_op
_UPSTREAM_UNARY = _UPSTREAM.unary_op
_UPSTREAM_FMA = _UPSTREAM.create_fma
_UPSTREAM_ATOMIC = _UPSTREAM.create_atomic_rmw


@contextlib.contextmanager
def bfloat16_arithmetic() -> Iterator[None]:
    """While active, elementwise operations, casts and atomic additions of bfloat16 are right."""
    with replaced(
        InterpreterBuilder,
        cast_impl=_cast,
        create_fp_to_fp=_float_to_float,
        binary_op=_binary,
        ternary_op=_ternary,
        unary_op=_unary,
        create_fma=_fma,
        create_atomic_rmw=_atomic_rmw,
    ):
        yield
