"""Adding an adapter's products: to what the base weight gives, and to sums of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.cpu import thin


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to total."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total.add_(left.t() @ right)


def adds_in_place(total: torch.dtype, factors: torch.dtype) -> bool:
    """Whether `add_product` adds factors of that dtype to a `total` of that dtype in place."""
    return total == factors or (total, factors) == (torch.bfloat16, torch.float32)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right: in place where `adds_in_place`, or on a CPU with instructions
    for it; else a new tensor."""
    if thin.available(total, left.dtype) and total.stride(1) == 1:
        thin.add_product(total, left, right)
        return total
    if not adds_in_place(total.dtype, left.dtype):
        return torch.add(total, left @ right)
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.addmm_(*_in_three(left, right))


def _in_three(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return bfloat16 factors whose product is float32's left @ right within 2^-16 of its terms:
    each float32 is the sum of two bfloat16, of whose four products the smallest is left out.

    This takes one pass over a bfloat16 sum, a float32 product takes three. (Henry, Tang and
    Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
    Computations".)
    """
    left_high, right_high = left.bfloat16(), right.bfloat16()
    left_low, right_low = (left - left_high).bfloat16(), (right - right_high).bfloat16()
    return (
        torch.cat((left_high, left_low, left_high), dim=1),
        torch.cat((right_high, right_high, right_low)),
    )
