"""Thin products of rows of every dtype are as near to float64 as torch's in float32, by every level
of instructions that the processor has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels.cpu import thin

pytestmark = [
    pytest.mark.skipif(
        not thin.is_built(torch.float16), reason="this CPU has no AVX2, or no C++ compiler"
    ),
    pytest.mark.usefixtures("level"),
]

FACTOR = 2.0
"""As many times torch's error in float32 is allowed, beside a few roundings of the largest term."""

dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
shapes = st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 70))
"""M, K or N, and R."""


def normal(*shape: int, seed: int, spread: int = 0) -> Tensor:
    """Return float32 numbers with magnitudes that differ by up to 2^spread."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * 2.0 ** torch.randint(-spread, spread + 1, shape, generator=generator)


def strided(values: Tensor, transposed: bool) -> Tensor:
    """Return the same values, the columns contiguous where `transposed`."""
    return values.t().contiguous().t() if transposed else values


def assert_as_good(actual: Tensor, left: Tensor, right: Tensor) -> None:
    """As left @ right in float32."""
    exact = left.double() @ right.double()
    plain = (left.float() @ right.float()).double() - exact
    terms = (left.double().abs() @ right.double().abs()).norm()
    allowed = FACTOR * plain.norm() + 4 * torch.finfo(torch.float32).eps * terms
    assert (actual.double() - exact).norm() <= allowed


@settings(max_examples=60)
@given(shapes, dtypes, st.booleans(), st.integers(0, 1 << 16))
@example((64, 96, 16), torch.bfloat16, False, 0)
@example((33, 31, 17), torch.bfloat16, True, 0)
def test_product(
    shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, seed: int
) -> None:
    m, k, r = shape
    x = normal(m, k, seed=seed).to(dtype)
    factor = strided(normal(r, k, seed=seed + 1, spread=8), transposed)
    columns = torch.full((m, r + 3), torch.nan)
    thin.product(x, factor, columns[:, 2 : 2 + r], 1.0)
    assert_as_good(columns[:, 2 : 2 + r], x, factor.t())
    assert columns[:, [0, 1, -1]].isnan().all(), "wrote beside its columns"


@settings(max_examples=60)
@given(shapes, dtypes, st.booleans(), st.integers(0, 1 << 16))
@example((64, 128, 16), torch.bfloat16, False, 0)
@example((1, 65, 17), torch.bfloat16, True, 0)
def test_gradient(
    shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, seed: int
) -> None:
    m, k, r = shape
    x = normal(m, k + 5, seed=seed).to(dtype)[:, 3 : 3 + k]
    low = normal(m, r + 2, seed=seed + 1, spread=8)[:, 1 : 1 + r]
    out = strided(torch.full((r, k), torch.nan), transposed)
    thin.gradient(low, x, out)
    assert_as_good(out, low.t(), x)


@settings(max_examples=60)
@given(shapes, dtypes, st.booleans(), st.integers(0, 1 << 16))
@example((64, 64, 16), torch.bfloat16, False, 0)
@example((33, 63, 17), torch.bfloat16, True, 0)
def test_add_product(
    shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, seed: int
) -> None:
    m, n, r = shape
    total = normal(m, n, seed=seed).to(dtype)
    low, factor = normal(m, r, seed=seed + 1), strided(normal(r, n, seed=seed + 2), transposed)
    wide = torch.full((m, n + 4), 7.0, dtype=dtype)
    wide[:, 1 : 1 + n] = total
    thin.add_product(wide[:, 1 : 1 + n], low, factor)
    exact = total.double() + low.double() @ factor.double()
    plain = (total + low @ factor).to(dtype).double() - exact
    product = (low.abs().double() @ factor.abs().double()).norm()
    error = (wide[:, 1 : 1 + n].double() - exact).norm()
    assert error <= plain.norm() * 1.01 + 2.0**-16 * product
    assert (wide[:, 0] == 7).all()
    assert (wide[:, 1 + n :] == 7).all()


def test_scaling() -> None:
    x, factor = normal(40, 64, seed=0).bfloat16(), normal(16, 64, seed=1)
    once, twice = torch.empty(40, 16), torch.empty(40, 16)
    thin.product(x, factor, once, 1.0)
    thin.product(x, factor, twice, 2.0)
    assert torch.equal(twice, 2 * once)


@pytest.mark.parametrize(
    ("rows", "factor"),
    [
        (torch.ones(2, 3).double(), torch.float32),
        (torch.ones(2, 3), torch.float64),
        (torch.ones(2, 3).bfloat16(), torch.bfloat16),
        (torch.ones(0, 3).bfloat16(), torch.float32),
        (torch.ones(2, 3, device="meta").bfloat16(), torch.float32),
    ],
    ids=["float64 rows", "float64 factor", "bfloat16 factor", "no rows", "another device"],
)
def test_other_operands_are_left_to_torch(rows: Tensor, factor: torch.dtype) -> None:
    assert not thin.available(rows, factor)
