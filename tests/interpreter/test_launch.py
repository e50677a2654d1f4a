"""Launches: arguments, loops, device functions, errors."""

# Kernels annotate parameters tl.constexpr and are launched with plain values:
# pyright: reportArgumentType=false
# Ranges of triton do not declare that they are iterable, or of what:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

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
def one_kernel(out_ptr, n):
    tl.store(out_ptr, n.to(tl.int64))


@triton.jit(do_not_specialize=["n"])
def exempt_one_kernel(out_ptr, n):
    tl.store(out_ptr, n.to(tl.int64))


@triton.jit(do_not_specialize=[1])
def exempt_one_by_position_kernel(out_ptr, n):
    tl.store(out_ptr, n.to(tl.int64))


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


@pytest.mark.parametrize("kernel", [one_kernel, exempt_one_kernel, exempt_one_by_position_kernel])
def test_an_integer_argument_of_one_is_a_constant(kernel) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](out, 7)
    assert out == 7
    if kernel is one_kernel:
        with pytest.raises(InterpreterError, match="'int' object has no attribute 'to'"):
            kernel[(1,)](out, 1)
    else:
        kernel[(1,)](out, 1)
        assert out == 1
    kernel[(1,)](out, True)
    assert out == 1


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
