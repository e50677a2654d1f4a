"""`qlora_compile::qlora_linear`: quantised matmul plus LoRA as one op, and `qlora_linear_group` for
Linears that share their input.

The graph names what is computed, never how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.linear_call import (
    group_problem,
    linears_of_call,
    qlora_linear_forward,
)
from qlora_compile.kernels.selection import current_source, keeps_low_rank


def hinted_rows(x: Tensor, k: int) -> int:
    """Rows of x [..., k]; a dynamic dimension stands for many, what it was at capture is one."""
    rows: Any = x.numel() // k if k else 0
    return rows if isinstance(rows, int) else rows.node.hint or 0


def qlora_linear(
    x: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    format: str,
    n: int,
    k: int,
    block_size: int,
    scaling: float,
    dropout: float,
    stream: int,
    compute_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [..., n] = x [..., k] @ dequant(planes)ᵀ + bias + scaling * drop(x) lora_aᵀ lora_bᵀ.

    planes: as `PackedWeight.planes`, or [weight] with format "none". seed: int64 [1] where the
    adapter's input is dropped out with probability `dropout`. Dtypes as in `LinearSpec`; casts
    happen inside, so autocast leaves the op alone.
    """
    (y,) = qlora_linear_group(
        *(x, planes, [bias], [lora_a], [lora_b], seed, format, [n], k, block_size, [scaling]),
        *(dropout, [stream], compute_dtype, lora_dtype, out_dtype),
    )
    return y


def qlora_linear_group(
    x: Tensor,
    planes: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    seed: Tensor | None,
    format: str,
    n: Sequence[int],
    k: int,
    block_size: int,
    scaling: Sequence[float],
    dropout: float,
    stream: Sequence[int],
    compute_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`qlora_linear` of several Linears that share x, with as many of each list; `planes` has
    those of the first, then those of the second, and so on."""
    constants = (format, n, k, block_size, scaling, dropout, stream)
    dtypes = (compute_dtype, lora_dtype, out_dtype)
    has_bias = [each is not None for each in bias]
    has_adapter = [each is not None for each in lora_a]
    count = len(planes) // len(n)
    flat = []
    for i, parts in enumerate(zip(bias, lora_a, lora_b, strict=True)):
        flat += [*planes[i * count : (i + 1) * count], *(t for t in parts if t is not None)]
    layout = (has_bias, has_adapter)
    keeps, source = False, current_source()
    factors = [factor for factor in (*lora_a, *lora_b) if factor is not None]
    if any(factor.requires_grad for factor in factors) and torch.is_grad_enabled():
        group = linears_of_call(x, flat, seed, layout, (*constants, *dtypes))
        keeps = keeps_low_rank(group_problem("forward", hinted_rows(x, k), group), source)
    *results, _ = qlora_linear_forward(x, flat, seed, *layout, keeps, source, *constants, *dtypes)
    return results


# Ops of their own in the graphs that the passes see, and nothing but the next one to autograd.
_LIBRARY = torch.library.Library("qlora_compile", "FRAGMENT")
for _op in (qlora_linear, qlora_linear_group):
    _LIBRARY.define(_op.__name__ + torch.library.infer_schema(_op, mutates_args=()))
    _LIBRARY.impl(_op.__name__, _op, "CompositeImplicitAutograd")

QLORA_LINEAR = torch.ops.qlora_compile.qlora_linear.default
"""The op as it appears in a graph."""

QLORA_LINEAR_GROUP = torch.ops.qlora_compile.qlora_linear_group.default


def quantized_linear(
    x: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    *,
    format: str,
    shape: tuple[int, int],
    block_size: int,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] @ dequant(planes)ᵀ + bias for a packed weight of `shape` [N, K].

    Without dtypes it runs and returns in x's dtype, or in autocast's where that is on, as
    `torch.nn.functional.linear` would.
    """
    device = x.device.type
    # Autocast leaves float64 alone.
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    own = torch.get_autocast_dtype(device) if casts else x.dtype
    compute_dtype = compute_dtype or own
    constants = (*shape, block_size, 1.0, 0.0, 0, compute_dtype, compute_dtype, out_dtype or own)
    return QLORA_LINEAR(x, planes, bias, None, None, None, format, *constants)
