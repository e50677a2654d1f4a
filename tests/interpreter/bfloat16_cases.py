"""bfloat16 values for tests, and the comparison that they need."""

from __future__ import annotations

import torch
from torch import Tensor

ALL = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)


def assert_same(actual: Tensor, expected: Tensor, *, zeros: bool = True) -> None:
    """Equal bits, but any NaN equals any NaN; `zeros` says whether -0 must not be +0."""
    assert actual.dtype == expected.dtype
    if actual.dtype.is_floating_point:
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan)
        actual, expected = actual.masked_fill(nan, 0), expected.masked_fill(nan, 0)
        if zeros:
            assert torch.equal(actual.signbit(), expected.signbit())
    assert torch.equal(actual, expected)
