"""Integers in interpreted kernels: overflow, high products, counter-based random numbers."""

# Kernels annotate parameters tl.constexpr and are launched with plain values:
# pyright: reportArgumentType=false

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from tests.interpreter.launch import IntegerOverflow

pytestmark = pytest.mark.usefixtures("guard")


@triton.jit
def offsets_kernel(out_ptr, stride, N: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, N)
    row = i.to(tl.int64) if WIDE else i
    tl.store(out_ptr + i, row * stride)


@triton.jit
def integer_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    else:  # wrapping
        out = tl.mul(x, y, sanitize_overflow=False)
    tl.store(out_ptr + i, out)


@triton.jit
def broadcast_product_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    out = tl.load(x_ptr + i)[:, None] * tl.load(y_ptr + i)[None, :]
    tl.store(out_ptr + i[:, None] * N + i[None, :], out)


@triton.jit
def high_product_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.umulhi(tl.load(x_ptr + i), tl.load(y_ptr + i)))


@triton.jit
def random_kernel(out_ptr, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c, d = tl.philox(seed, i, i * 0 + 5, i * 0, i * 0 + 7)
    tl.store(out_ptr + i, a)
    tl.store(out_ptr + N + i, b)
    tl.store(out_ptr + 2 * N + i, c)
    tl.store(out_ptr + 3 * N + i, d)


def test_offsets_beyond_int32() -> None:
    out = torch.zeros(4, dtype=torch.int64)
    offsets_kernel[(1,)](out, 1 << 30, 4, True)
    assert out.tolist() == [n << 30 for n in range(4)]
    offsets_kernel[(1,)](out, 1 << 29, 4, False)
    assert out.tolist() == [n << 29 for n in range(4)]
    with pytest.raises(IntegerOverflow, match="int32 overflow: mul gives 2147483648; cast"):
        offsets_kernel[(1,)](out, 1 << 30, 4, False)


int32 = st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(-(1 << 17), 1 << 17)


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@given(st.lists(st.tuples(int32, int32), min_size=4, max_size=4))
def test_signed_overflow(operation: str, pairs: list[tuple[int, int]]) -> None:
    compute = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}[operation]
    exact = [compute(*pair) for pair in pairs]
    x, y = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    out = torch.empty_like(x)
    if all(-(1 << 31) <= value < 1 << 31 for value in exact):
        integer_kernel[(1,)](x, y, out, 4, operation)
        assert out.tolist() == exact
    else:
        with pytest.raises(IntegerOverflow, match=operation):
            integer_kernel[(1,)](x, y, out, 4, operation)


def test_overflow_of_broadcast_operands() -> None:
    x = torch.tensor([1, 2, 3, 1 << 20], dtype=torch.int32)
    out = torch.empty(4, 4, dtype=torch.int32)
    broadcast_product_kernel[(1,)](x, torch.tensor([1, 2, 3, 2047]).int(), out, 4)
    assert out[3, 3] == 2047 << 20
    with pytest.raises(IntegerOverflow):
        broadcast_product_kernel[(1,)](x, torch.tensor([1, 2, 3, 2048]).int(), out, 4)


def test_unsigned_and_explicit_arithmetic_wraps() -> None:
    x = torch.tensor([0xFFFFFFFF, 0x80000000], dtype=torch.int64).to(torch.uint32)
    out = torch.empty(2, dtype=torch.uint32)
    integer_kernel[(1,)](x, x, out, 2, "mul")
    assert out.tolist() == [1, 0]
    signed = torch.tensor([1 << 30, -3], dtype=torch.int32)
    wrapped = torch.empty_like(signed)
    integer_kernel[(1,)](signed, torch.tensor([6, 5]).int(), wrapped, 2, "wrapping")
    assert wrapped.tolist() == [-(1 << 31), -15]


@given(st.lists(st.tuples(*[st.integers(0, (1 << 32) - 1)] * 2), min_size=4, max_size=4))
def test_high_half_of_a_product(pairs: list[tuple[int, int]]) -> None:
    x, y = torch.tensor(pairs).T.to(torch.uint32).contiguous()
    out = torch.empty(4, dtype=torch.uint32)
    high_product_kernel[(1,)](x, y, out, 4)
    assert out.tolist() == [a * b >> 32 for a, b in pairs]


def philox(key: tuple[int, int], counter: tuple[int, ...]) -> tuple[int, ...]:
    """Compute Philox 4×32 with ten rounds (Salmon et al., 2011) in Python integers."""
    mask = (1 << 32) - 1
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            second >> 32 ^ counter[1] ^ key[0],
            second & mask,
            first >> 32 ^ counter[3] ^ key[1],
            first & mask,
        )
        key = key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask
    return counter


@pytest.mark.parametrize("seed", [0, 12345, (7 << 32) + 3])
def test_philox(seed: int) -> None:
    # The published answer for a counter and a key of zeros.
    assert philox((0, 0), (0,) * 4) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    out = torch.empty(4, 16, dtype=torch.uint32)
    random_kernel[(1,)](out, seed, 16)
    expected = [philox((seed & 0xFFFFFFFF, seed >> 32), (i, 5, 0, 7)) for i in range(16)]
    assert np.array_equal(out.numpy().T, np.array(expected))
