"""The search for zero points of "Half-Quadratic Quantization of Large Machine Learning Models"
(Badri and Shaji 2023), which needs no data.

It minimises the sum of |w - w_q|**p, p < 1, over the zero points, so that most weights are near and
a few may be far off. With scales fixed, everything is measured in their units.
"""

from __future__ import annotations

import torch
from torch import Tensor

_POWER = 0.7
_STEPS = 20
_BETA = 10.0
_GROWTH = 1.01
"""p, and the schedule of the penalty, as in the paper."""


def refined_zeros(groups: Tensor, counted: Tensor, zeros: Tensor, largest: int) -> Tensor:
    """Return zero points, float32 [rows, groups], no worse for any group than `zeros`.

    groups: the weights over their scales, float32 [rows, groups, size]. counted: 1 for each weight
    and 0 for the padding of the last group, float32 [groups, size]. largest: the largest code.

    Two problems with exact solutions alternate. First the error e is split into a sparse part s and
    the rest, by minimising ||s||_p + beta / 2 ||s - e||**2 over s, whose solution shrinks every
    error: s = sign(e) max(|e| - |e|**(p - 1) / beta, 0). Then the mean of code - (w - s) is the
    zero with the least squared rest.
    """
    best, beta = zeros, _BETA
    least = torch.full_like(zeros, torch.inf)
    for _ in range(_STEPS):
        codes = (groups + zeros.unsqueeze(2)).round_().clamp_(0, largest)
        errors = groups - (codes - zeros.unsqueeze(2))
        sizes = errors.abs()
        found = (sizes.pow(_POWER) * counted).sum(2)
        best = torch.where(found < least, zeros, best)
        least = torch.minimum(found, least)
        # An error of zero, whose power is infinite, stays zero.
        shrunk = (sizes - sizes.pow(_POWER - 1.0) / beta).clamp_(min=0)
        rest = (codes - groups + torch.copysign(shrunk, errors)) * counted
        zeros = rest.sum(2) / counted.sum(1)
        beta *= _GROWTH
    return best
