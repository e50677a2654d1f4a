"""Sums, scans, extrema and dot products in the interpreter."""

# Kernels annotate parameters tl.constexpr and are launched with plain values:
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

pytestmark = pytest.mark.usefixtures("guard")

SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def reduce_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, OP: tl.constexpr):  # fmt: skip # noqa: E501
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    if OP == "sum":
        out = tl.sum(x, AXIS)
    elif OP == "sum_float32":
        out = tl.sum(x, AXIS, dtype=tl.float32)
    elif OP == "max":
        out = tl.max(x, AXIS)
    elif OP == "min":
        out = tl.min(x, AXIS)
    elif OP == "argmax":
        _, out = tl.max(x, AXIS, return_indices=True)
    elif OP == "argmin_value":
        out, _ = tl.min(x, AXIS, return_indices=True)
    else:  # product
        out = tl.reduce(x, AXIS, multiply)
    tl.store(out_ptr + (n if AXIS == 0 else m), out)


@triton.jit
def sum_all_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + i[:, None] * N + i[None, :])))


@triton.jit
def scan_kernel(x_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.cumsum(x, 1) if OP == "sum" else tl.cumprod(x, 1))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    ones = tl.full((N, N), 1.0, tl.float32)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, tl.dot(a, b, ones, input_precision=PRECISION))


def reduce(x: Tensor, axis: int, operation: str, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape[1 - axis], dtype=dtype)
    rows, columns = x.shape
    reduce_kernel[(1,)](x, out, rows, columns, axis, operation)
    return out


def halving_sum(x: Tensor) -> Tensor:
    """Sum over axis 0, with partial sums rounded to the dtype of `x`."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


@SIXTEEN_BITS
@pytest.mark.parametrize("axis", [0, 1])
def test_sums_round_at_each_step(dtype: torch.dtype, axis: int) -> None:
    x = torch.randn(16, 32).to(dtype)
    actual = reduce(x, axis, "sum", dtype)
    assert torch.equal(actual, halving_sum(x if axis == 0 else x.T))
    assert not torch.equal(actual, x.double().sum(axis).to(dtype))


@SIXTEEN_BITS
def test_sum_of_everything(dtype: torch.dtype) -> None:
    x = torch.randn(16, 16).to(dtype)
    out = torch.empty(1, dtype=dtype)
    sum_all_kernel[(1,)](x, out, 16)
    assert torch.equal(out[0], halving_sum(x.flatten()))


@SIXTEEN_BITS
def test_sum_in_float32_is_exact(dtype: torch.dtype) -> None:
    x = torch.randint(-99, 99, (16, 32)).to(dtype)
    assert torch.equal(reduce(x, 1, "sum_float32", torch.float32), x.double().sum(1).float())


@SIXTEEN_BITS
@pytest.mark.parametrize("axis", [0, 1])
def test_extrema_ignore_nan(dtype: torch.dtype, axis: int) -> None:
    x = torch.randn(16, 32).to(dtype)
    x[3, 5] = float("nan")
    x[3, 6] = float("inf")
    x[7, 9] = -float("inf")
    low, high = x.float().nan_to_num(1e9, 1e9, -1e9), x.float().nan_to_num(-1e9, 1e9, -1e9)
    # Triton compares 16-bit floats in float32 and returns that.
    expected = high.amax(axis).masked_fill(high.amax(axis) == 1e9, float("inf"))
    assert torch.equal(reduce(x, axis, "max", torch.float32), expected)
    expected = low.amin(axis).masked_fill(low.amin(axis) == -1e9, -float("inf"))
    assert torch.equal(reduce(x, axis, "min", torch.float32), expected)
    assert torch.equal(reduce(x, axis, "argmin_value", dtype), expected.to(dtype))
    assert torch.equal(reduce(x, axis, "argmax", torch.int32), high.argmax(axis).int())


@SIXTEEN_BITS
def test_a_reduction_with_its_own_combination(dtype: torch.dtype) -> None:
    x = 1 + torch.randn(4, 8).to(dtype) / 4
    expected = x[:, 0]
    for column in x.T[1:]:
        expected = expected * column
    assert torch.equal(reduce(x, 1, "product", dtype), expected)


@SIXTEEN_BITS
@pytest.mark.parametrize("operation", ["sum", "product"])
def test_scans_round_at_each_step(dtype: torch.dtype, operation: str) -> None:
    x = 1 + torch.randn(16, 16).to(dtype) / 4
    out, expected = torch.empty_like(x), x.clone()
    for i in range(1, 16):
        both = expected[:, i - 1], x[:, i]
        expected[:, i] = both[0] + both[1] if operation == "sum" else both[0] * both[1]
    scan_kernel[(1,)](x, out, 16, operation)
    assert torch.equal(out, expected)


def dot(a: Tensor, b: Tensor, precision: str | None = None) -> Tensor:
    out = torch.empty(a.shape)
    dot_kernel[(1,)](a, b, out, len(a), precision)
    return out


@SIXTEEN_BITS
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    # Products of eight digits by eight, and 32 of them, fit into float32 without rounding.
    a, b = (torch.randint(-255, 256, (32, 32)).to(dtype) for _ in range(2))
    assert torch.equal(dot(a, b), (a.double() @ b.double() + 1).float())


def test_dot_of_float32_is_tf32_unless_told_otherwise() -> None:
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    tf32, exact = cut[0] @ cut[1] + 1, a.double() @ b.double() + 1
    for precision in (None, "tf32"):
        torch.testing.assert_close(dot(a, b, precision).double(), tf32, rtol=0, atol=2e-5)
    for precision in ("ieee", "tf32x3"):
        torch.testing.assert_close(dot(a, b, precision).double(), exact, rtol=0, atol=2e-5)
    assert (tf32 - exact).abs().max() > 1e-3
