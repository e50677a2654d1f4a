"""Products that torch computes by plain loops: of 16 bits, on a CPU without instructions for them.

The loops of a gradient take up to 400 times as long as our products, which compute in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.instructions import multiplies
from qlora_compile.kernels.gpu.target import target_of

FEW_ROWS = 32
"""With fewer rows and without a gradient, torch's loops take less time than reading the whole
weight in float32."""


def is_looped(operand: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether torch multiplies an operand, cast to `dtype` if given, by loops."""
    on_cpu = operand.device.type == "cpu" and target_of("cpu") is None
    return on_cpu and not multiplies(dtype or operand.dtype)


def may_be_slow(weight: Tensor) -> bool:
    """Whether torch multiplies by a frozen weight in loops, at least under autocast."""
    cast = torch.bfloat16 if weight.dtype == torch.float32 else None
    return not weight.requires_grad and is_looped(weight, cast)


def is_slow(rows: Tensor) -> bool:
    """Whether torch takes longer than our op to multiply `rows` [..., K] by a frozen weight now."""
    casts = torch.is_autocast_enabled("cpu") and rows.dtype != torch.float64
    count = rows.shape[:-1].numel()
    differentiates = torch.is_grad_enabled() and rows.requires_grad
    return (count >= FEW_ROWS or (differentiates and count > 0)) and is_looped(
        rows, torch.get_autocast_dtype("cpu") if casts else None
    )
