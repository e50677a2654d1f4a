"""Casts from and to bfloat16 in the interpreter."""

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

from tests.interpreter.bfloat16 import decode, encode
from tests.interpreter.bfloat16_cases import ALL, assert_same
from tests.interpreter.exact_rounding import BFLOAT16, nearest

pytestmark = pytest.mark.usefixtures("guard")


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr, TO: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(TO, fp_downcast_rounding=ROUNDING))


def float32_values() -> Tensor:
    """Draw values near the middle between bfloat16 neighbours, and special values of all kinds."""
    middles = ALL.view(torch.int16).to(torch.int32) << 16
    around = torch.tensor([0x7FFF, 0x8000, 0x8001, 0xFFFF, 1])
    return (middles[::4, None] | around).to(torch.int32).flatten()[: 1 << 16].view(torch.float32)


def cast(values: Tensor, dtype: torch.dtype, rounding: str | None = None) -> Tensor:
    out = torch.empty(len(values), dtype=dtype)
    to = tl.int1 if dtype == torch.bool else getattr(tl, str(dtype).removeprefix("torch."))
    cast_kernel[(1,)](values, out, len(values), to, rounding)
    return out


def test_to_bfloat16_rounds_to_nearest_even() -> None:
    assert_same(cast(float32_values(), torch.bfloat16), float32_values().to(torch.bfloat16))
    halves = ALL.view(torch.float16)
    assert_same(cast(halves, torch.bfloat16), halves.to(torch.bfloat16))


def test_to_bfloat16_toward_zero_on_request() -> None:
    values = float32_values()
    truncated = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    truncated = torch.where(values.isnan(), values, truncated).to(torch.bfloat16)
    assert_same(cast(values, torch.bfloat16, "rtz"), truncated)


def test_to_float16_toward_zero_on_request() -> None:
    values = torch.cat([torch.linspace(-70000, 70000, 4095), torch.tensor([1e-7])])
    expected = values.half()
    too_far = expected.float().abs() > values.abs()
    expected.view(torch.int16)[too_far] -= 1
    assert_same(cast(values, torch.float16, "rtz"), expected)
    assert too_far.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_from_bfloat16_to_other_floats(dtype: torch.dtype) -> None:
    assert_same(cast(ALL, dtype), ALL.to(dtype))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str
)
def test_integers_to_bfloat16_and_back(dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15) * 65537
    values = values.to(dtype)
    assert_same(cast(values, torch.bfloat16), values.to(torch.bfloat16))
    floats = torch.arange(-128, 128).to(dtype).to(torch.bfloat16)
    assert_same(cast(floats, dtype), floats.to(dtype))


@given(st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False), min_size=1))
def test_float64_is_rounded_once(values: list[float]) -> None:
    expected = [nearest(Fraction(value), BFLOAT16) for value in values]
    with np.errstate(over="ignore"):
        assert decode(encode(np.array(values))).tolist() == expected


@pytest.mark.parametrize("value", [1 + 2**-8 + 2**-40, 2.0**-134 + 2.0**-170, 3.39617e38])
def test_float64_just_above_a_middle_is_rounded_up(value: float) -> None:
    assert cast(torch.tensor([value], dtype=torch.float64), torch.bfloat16) == nearest(
        Fraction(value), BFLOAT16
    )
