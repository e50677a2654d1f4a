"""bfloat16 in the interpreter: elementwise operations, data movement, atomics."""

# Kernels annotate parameters tl.constexpr and are launched with plain values:
# pyright: reportArgumentType=false

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import InterpreterError

from tests.interpreter.bfloat16 import decode, multiply_add
from tests.interpreter.bfloat16_cases import ALL, assert_same
from tests.interpreter.exact_rounding import BFLOAT16, nearest

pytestmark = pytest.mark.usefixtures("guard")

SPECIAL = torch.tensor(
    [
        *(0x0000, 0x0001, 0x0002, 0x007F, 0x0080, 0x0081, 0x0100, 0x1F80, 0x2000, 0x3B80, 0x3B81),
        *(0x3C00, 0x3DCC, 0x3E80, 0x3F7F, 0x3F80, 0x3F81, 0x3FC0, 0x4000, 0x4049, 0x42C8, 0x437F),
        *(0x4380, 0x4381, 0x4B00, 0x5F00, 0x7E80, 0x7F00, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0),
    ],
    dtype=torch.int32,
).to(torch.int16)
SPECIAL = torch.cat([SPECIAL, SPECIAL | -(1 << 15)]).view(torch.bfloat16)  # 64 values
LEFT, RIGHT = SPECIAL.repeat_interleave(64), SPECIAL.repeat(64)


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "maximum_nan":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "lt":
        out = x < y
    elif OP == "le":
        out = x <= y
    elif OP == "gt":
        out = x > y
    elif OP == "ge":
        out = x >= y
    elif OP == "eq":
        out = x == y
    elif OP == "ne":
        out = x != y
    elif OP == "both":
        out = (x > y) & (y > 0.0)
    elif OP == "select":
        out = tl.where(x > y, x, y)
    else:  # count
        out = (x > y).to(tl.bfloat16) + (x < y).to(tl.bfloat16)
    tl.store(out_ptr + i, out)


@triton.jit
def unary_kernel(x_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "clamp":
        out = tl.clamp(x, -1.5, 100.0)
    elif OP == "clamp_nan":
        out = tl.clamp(x, -1.5, 100.0, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "constant":
        out = x * 0.1 + 3
    elif OP == "relu":
        out = tl.where(x > 0, x, 0.0)
    else:  # bits
        out = x.to(tl.uint16, bitcast=True)
    tl.store(out_ptr + i, out)


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N) % 5
    tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


@triton.jit
def movement_kernel(x_ptr, index_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    if OP == "trans":
        x = x.T
    elif OP == "permute":
        x = tl.reshape(tl.permute(tl.reshape(x, (2, N // 2, N)), (1, 0, 2)), (N, N))
    elif OP == "join_split":
        low, high = tl.split(tl.reshape(x, (N, N // 2, 2)))
        x = tl.reshape(tl.join(high, low), (N, N))
    elif OP == "gather":
        x = tl.gather(x, tl.load(index_ptr + i), 0)
    elif OP == "broadcast":
        x = tl.broadcast_to(tl.load(x_ptr + tl.arange(0, N))[:, None], (N, N))
    elif OP == "full":
        x = tl.full((N, N), 0.1, tl.bfloat16)
    tl.store(out_ptr + i, x)


@triton.jit
def masked_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.1))


@triton.jit
def atomic_kernel(x_ptr, sums_ptr, old_ptr, n, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OP == "add":
        old = tl.atomic_add(sums_ptr + i % 3, x, mask=i < n)
        tl.store(old_ptr + i, old, mask=i < n)
    else:
        tl.atomic_max(sums_ptr + i % 3, x, mask=i < n)


def number(x: Tensor, y: Tensor, both: Tensor) -> Tensor:
    """Return the operand that is not NaN, or `both` where both are."""
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, both))


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        ("add", torch.add),
        ("sub", torch.sub),
        ("mul", torch.mul),
        # Not torch.fmax, which lets a signalling NaN through.
        ("maximum", lambda x, y: number(x, y, torch.maximum(x, y))),
        ("minimum", lambda x, y: number(x, y, torch.minimum(x, y))),
        ("maximum_nan", torch.maximum),
        ("lt", torch.lt),
        ("le", torch.le),
        ("gt", torch.gt),
        ("ge", torch.ge),
        ("eq", torch.eq),
        ("ne", torch.ne),
        ("both", lambda x, y: (x > y) & (y > 0)),
        ("select", lambda x, y: torch.where(x > y, x, y)),
        ("count", lambda x, y: (x > y).bfloat16() + (x < y).bfloat16()),
        ("div", lambda x, y: x.float() / y.float()),
    ],
)
def test_binary(operation: str, reference) -> None:
    expected = reference(LEFT, RIGHT)
    out = torch.empty_like(expected)
    binary_kernel[(1,)](LEFT, RIGHT, out, len(LEFT), operation)
    # IEEE leaves the sign of max(+0, -0) open.
    assert_same(out, expected, zeros=not operation.startswith("m") or operation == "mul")


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        ("neg", torch.neg),
        ("abs", torch.abs),
        ("clamp", lambda x: torch.where(x.isnan(), -1.5, x).clamp(-1.5, 100.0)),
        ("clamp_nan", lambda x: x.clamp(-1.5, 100.0)),
        # Constants take the dtype of the tensor.
        ("constant", lambda x: x * torch.tensor(0.1).bfloat16() + torch.tensor(3).bfloat16()),
        ("relu", lambda x: torch.where(x > 0, x, 0.0)),
        ("bits", lambda x: x.view(torch.uint16)),
    ],
)
def test_unary(operation: str, reference) -> None:
    expected = reference(ALL)
    out = torch.empty_like(expected)
    unary_kernel[(1,)](ALL, out, len(ALL), operation)
    assert_same(out, expected)


finite_bits = st.integers(0, 0x7F7F) | st.integers(0x8000, 0xFF7F)


@given(st.lists(st.tuples(finite_bits, finite_bits, finite_bits), min_size=1, max_size=20))
def test_fma_rounds_once(triples: list[tuple[int, int, int]]) -> None:
    bits = np.array(triples, np.uint16)
    with np.errstate(over="ignore"):
        actual = decode(multiply_add(bits[:, 0], bits[:, 1], bits[:, 2])).tolist()
    assert actual == [
        nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)), BFLOAT16)
        for a, b, c in decode(bits)
    ]


def test_fma_in_a_kernel() -> None:
    # The products lie on middles, and float64 has no room for the addends that decide.
    x = torch.tensor([1 + 2**-7, 1 + 3 * 2**-7, 1 + 2**-7, torch.inf, 3.0]).bfloat16()
    y = torch.tensor([1.5, 1.5, 1.5, 0.0, -2.0]).bfloat16()
    z = torch.tensor([-(2.0**-100), 2.0**-100, 0.0, 1.0, torch.nan]).bfloat16()
    out = torch.empty_like(x)
    fma_kernel[(1,)](x, y, z, out, 8)
    assert out[:3].tolist() == [1.5 + 2**-7, 1.5 + 5 * 2**-7, 1.5 + 2 * 2**-7]
    assert out[3:].isnan().all()


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        ("copy", lambda x, index: x),
        ("trans", lambda x, index: x.T),
        ("permute", lambda x, index: x.view(2, 8, 16).permute(1, 0, 2).reshape(16, 16)),
        ("join_split", lambda x, index: x.view(16, 8, 2).flip(2).reshape(16, 16)),
        ("gather", lambda x, index: x.gather(0, index.long())),
        ("broadcast", lambda x, index: x[0][:, None].expand(16, 16)),
        ("full", lambda x, index: torch.full_like(x, 0.1)),
    ],
)
def test_movement_keeps_bits(operation: str, reference) -> None:
    x = ALL[torch.randperm(len(ALL))[:256]].view(16, 16)
    index = torch.randint(0, 16, (16, 16), dtype=torch.int32)
    out = torch.empty_like(x)
    movement_kernel[(1,)](x, index, out, 16, operation)
    assert torch.equal(out.view(torch.int16), reference(x, index).contiguous().view(torch.int16))


def test_other_of_a_masked_load() -> None:
    x, out = torch.randn(16).bfloat16(), torch.empty(16).bfloat16()
    masked_kernel[(1,)](x, out, 5, 16)
    assert_same(out, torch.cat([x[:5], torch.full((11,), 0.1).bfloat16()]))


def test_atomic_add() -> None:
    x = torch.randn(16).bfloat16()
    sums, old = torch.ones(3).bfloat16(), torch.empty(16).bfloat16()
    expected, before = sums.clone(), old.clone()
    for i in range(13):
        before[i] = expected[i % 3]
        expected[i % 3] += x[i]
    atomic_kernel[(1,)](x, sums, old, 13, 16, "add")
    assert_same(sums, expected)
    assert_same(old, before)


def test_other_atomics_raise() -> None:
    x = torch.ones(4).bfloat16()
    with pytest.raises(InterpreterError, match="does not support bf16"):
        atomic_kernel[(1,)](x, torch.zeros(3).bfloat16(), x, 4, 4, "max")
