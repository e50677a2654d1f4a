"""Dropout by vector instructions drops what `keep_mask` drops, by every level of instructions that
the processor has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels.cpu import dropout
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.plans.bits import same_bits

pytestmark = [
    pytest.mark.skipif(not dropout.is_built(), reason="this CPU has no AVX2, or no C++ compiler"),
    pytest.mark.usefixtures("level"),
]

shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
seeds = st.integers(-(2**63), 2**63 - 1)
streams = st.integers(0, 2**32 - 1)
probabilities = st.sampled_from([0.0, 1e-9, 2.0**-16, 0.05, 0.5, 1 - 2.0**-16, 1.0])
firsts = st.sampled_from([0, 1, 7, 255, 2**29, 2**33 + 5])
"""The last ones begin with counters of more than 32 bits."""


def strided(values: Tensor, transposed: bool) -> Tensor:
    """Return the same values in rows with others beside them, or the columns contiguous."""
    if transposed:
        return values.t().contiguous().t()
    return torch.nn.functional.pad(values, (3, 2), value=1.0)[:, 3:-2]


@settings(max_examples=100)
@given(shapes, dtypes, seeds, streams, probabilities, firsts, st.booleans())
@example((1, 2048), torch.bfloat16, 2**63 - 1, 2**32 - 1, 0.05, 0, False)
@example((3, 2049), torch.float32, -1, 0, 0.5, 2**33 + 5, False)
def test_the_same_elements_are_dropped(
    shape: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
    stream: int,
    probability: float,
    first: int,
    transposed: bool,
) -> None:
    m, k = shape
    given_seed = torch.tensor([seed])
    x, before = torch.randn(2, m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    x[0, 0] = torch.nan
    x[-1, -1] = -torch.inf
    drawn = (given_seed, stream, probability)
    mask = keep_mask(*drawn, (first, first + m), k)
    found = dropout.dropped(strided(x, transposed), *drawn, first)
    assert found.is_contiguous()
    assert same_bits(found, torch.where(mask, x, 0))
    wide = torch.nn.functional.pad(before, (1, 4), value=7.0)
    out = wide[:, 1:-4]
    dropout.put(strided(x, transposed), out, *drawn, first)
    assert same_bits(out, torch.where(mask, x, before))
    assert (wide[:, [0, -1, -2, -3, -4]] == 7.0).all(), "wrote beside its rows"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_draw_the_same(threads: int) -> None:
    x, seed = torch.ones(33, 1000), torch.tensor([3])
    expected = keep_mask(seed, 5, 0.3, (0, 33), 1000, x.dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(dropout.dropped(x, seed, 5, 0.3), expected)
    finally:
        torch.set_num_threads(before)


def test_others_are_not_taken() -> None:
    assert dropout.available(torch.ones(2, 3, dtype=torch.float16))
    assert not dropout.available(torch.ones(2, 3, dtype=torch.float64))
    assert not dropout.available(torch.ones(2, 0))
    assert not dropout.available(torch.ones(2, 3, device="meta"))
