"""Launches: arguments, loops, integers, device functions, random numbers, errors."""

# Kernels annotate parameters tl.constexpr and are launched with plain values:
# pyright: reportArgumentType=false
# Ranges of triton do not declare that they are iterable, or of what:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError

from tests.interpreter.launch import IntegerOverflow

pytestmark = pytest.mark.usefixtures("guard")


@triton.jit
def negate(x):
    return -x


@triton.jit
def halve(x):
    return x * 0.5


@triton.jit
def decode_kernel(x_ptr, out_ptr, N: tl.constexpr, DECODE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, DECODE(tl.load(x_ptr + i)))


@triton.jit
def float_argument_kernel(x_ptr, out_ptr, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i) * scale)


@triton.jit
def tuple_kernel(x_ptrs, sizes, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for n in tl.static_range(len(x_ptrs)):
        total += tl.load(x_ptrs[n] + i, mask=i < sizes[n], other=0.0)
    tl.store(out_ptr + i, total)


@triton.jit
def loop_kernel(out_ptr, start, stop, step, KIND: tl.constexpr):
    total = tl.zeros((1,), tl.int64)
    if KIND == "range":
        for k in range(start, stop, step):
            total += k.to(tl.int64)
    elif KIND == "tl.range":
        for k in tl.range(start, stop, step, num_stages=3):
            total += k.to(tl.int64)
    elif KIND == "static":
        for k in tl.static_range(0, 5):
            total += k
    else:  # nested
        for i in range(start, stop):
            for j in range(step):
                if j < i:
                    total += i * 10 + j
    tl.store(out_ptr + tl.arange(0, 1), total)


@triton.jit
def loop_type_kernel(out_ptr, stop, WIDE: tl.constexpr):
    for k in range(stop):
        tl.static_assert(k.dtype == (tl.int64 if WIDE else tl.int32))
        tl.store(out_ptr + k, k)


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


@triton.jit
def grid_kernel(out_ptr):
    x, y = tl.program_id(0), tl.program_id(1)
    tl.store(out_ptr + x * tl.num_programs(1) + y, x * 10 + y)


@triton.jit
def failing_kernel(out_ptr):
    tl.store(out_ptr, tl.exp(tl.program_id(0)))


def test_a_device_function_as_a_constexpr() -> None:
    x, out = torch.randn(8), torch.zeros(8)
    for decode, expected in ((negate, -x), (halve, x / 2)):
        decode_kernel[(1,)](x, out, 8, decode)
        assert torch.equal(out, expected)


def test_a_float_argument_is_float32() -> None:
    x, out = torch.randn(8).bfloat16(), torch.zeros(8)
    float_argument_kernel[(1,)](x, out, 0.1, 8)
    assert torch.equal(out, x.float() * torch.tensor(0.1))


def test_tuples_of_pointers_and_of_numbers() -> None:
    xs = torch.randn(3), torch.randn(8), torch.randn(5)
    out = torch.zeros(8)
    tuple_kernel[(1,)](xs, tuple(map(len, xs)), out, 8)
    padded = [torch.nn.functional.pad(x, (0, 8 - len(x))) for x in xs]
    assert torch.equal(out, padded[0] + padded[1] + padded[2])


@pytest.mark.parametrize("kind", ["range", "tl.range"])
@pytest.mark.parametrize("bounds", [(0, 7, 1), (3, 20, 4), (0, 0, 1), (9, -9, -5)])
def test_loop_variables_are_tensors(kind: str, bounds: tuple[int, int, int]) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    loop_kernel[(1,)](out, *bounds, kind)
    assert out == sum(range(*bounds))


def test_static_and_nested_loops() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    loop_kernel[(1,)](out, 0, 0, 0, "static")
    assert out == 10
    loop_kernel[(1,)](out, 1, 4, 9, "nested")
    assert out == 10 + (20 + 21) + (30 + 31 + 32)


def test_loop_variables_have_the_width_of_their_bounds() -> None:
    out = torch.zeros(3, dtype=torch.int64)
    loop_type_kernel[(1,)](out, 3, False)
    assert out.tolist() == [0, 1, 2]
    with pytest.raises(InterpreterError, match="AssertionError"):
        loop_type_kernel[(1,)](out, 3, True)


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
    """Philox 4×32 with ten rounds (Salmon et al., 2011) in Python integers."""
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


def test_grids() -> None:
    out = torch.zeros(2, 3, dtype=torch.int32)
    grid_kernel[(2, 3)](out)
    assert out.tolist() == [[0, 1, 2], [10, 11, 12]]
    out.zero_()
    grid_kernel[lambda meta: (2, 3)](out)
    assert out[1, 2] == 12
    with pytest.raises(ValueError, match="at most 3 dimensions"):
        grid_kernel[(1, 1, 1, 1)](out)


def test_other_errors_come_as_triton_raises_them() -> None:
    with pytest.raises(InterpreterError, match="got int32"):
        failing_kernel[(1,)](torch.zeros(1))


def test_device_functions_are_not_for_the_host() -> None:
    with pytest.raises(RuntimeError, match="negate is called from outside of a kernel"):
        negate(1)
