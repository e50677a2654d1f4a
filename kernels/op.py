"""`qlora_compile::qlora_linear`: quantised matmul plus LoRA as one op, forward and backward.

The graph names what is computed, never how: the op picks a variant for its Problem when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.registry import UNQUANTIZED, format_named
from qlora_compile.kernels.selection import current_source, keeps_low_rank, select
from qlora_compile.kernels.variants.base import (
    LinearSpec,
    LinearTensors,
    NeedsGradient,
)
from qlora_compile.problem import Direction, Problem, bucket_rows


def linear_spec(format: str, *constants: Any) -> LinearSpec:
    """The spec of a call, from `qlora_linear`'s arguments behind its tensors."""
    return LinearSpec(None if format == UNQUANTIZED else format_named(format), *constants)


def linear_problem(
    direction: Direction, rows: int, tensors: LinearTensors, spec: LinearSpec
) -> Problem:
    """The key of a call with so many rows, whatever shape `tensors.x` has."""
    return Problem(
        direction=direction,
        m=bucket_rows(rows),
        n=spec.n,
        k=spec.k,
        rank=0 if tensors.lora_a is None else tensors.lora_a.shape[0],
        format=UNQUANTIZED if spec.format is None else spec.format.name,
        block_size=spec.block_size,
        double_quantized=len(tensors.planes) > 2,
        x_dtype=tensors.x.dtype,
        compute_dtype=spec.compute_dtype,
        lora_dtype=spec.lora_dtype,
        out_dtype=spec.out_dtype,
        bias=tensors.bias is not None,
        dropout=tensors.seed is not None,
        keeps_low_rank=tensors.low_rank is not None,
        device=str(tensors.x.device),
    )


def hinted_rows(x: Tensor, k: int) -> int:
    """Rows of x [..., k]; a dynamic dimension stands for many, what it was at capture is one."""
    rows: Any = x.numel() // k if k else 0
    return rows if isinstance(rows, int) else rows.node.hint or 0


# No defaults in the schemas: autograd of custom ops drops defaulted arguments and then miscounts
# the tensors of a list.
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
    constants = (
        *(format, n, k, block_size, scaling, dropout, stream),
        *(compute_dtype, lora_dtype, out_dtype),
    )
    keeps, source = False, current_source()
    trained = any(factor is not None and factor.requires_grad for factor in (lora_a, lora_b))
    if trained and torch.is_grad_enabled():
        rows = hinted_rows(x, k)
        tensors = LinearTensors(x, planes, bias, lora_a, lora_b, seed)
        problem = linear_problem("forward", rows, tensors, linear_spec(*constants))
        keeps = keeps_low_rank(problem, source)
    y, _ = qlora_linear_forward(x, planes, bias, lora_a, lora_b, seed, keeps, source, *constants)
    return y


# An op of its own in the graphs that the passes see, and nothing but the next one to autograd.
_LIBRARY = torch.library.Library("qlora_compile", "FRAGMENT")
_LIBRARY.define("qlora_linear" + torch.library.infer_schema(qlora_linear, mutates_args=()))
_LIBRARY.impl("qlora_linear", qlora_linear, "CompositeImplicitAutograd")

QLORA_LINEAR = torch.ops.qlora_compile.qlora_linear.default
"""The op as it appears in a graph."""


@torch.library.custom_op("qlora_compile::qlora_linear_forward", mutates_args=())
def qlora_linear_forward(
    x: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    keeps: bool,
    source: str,
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
) -> tuple[Tensor, Tensor]:
    """y of `qlora_linear` and, if it `keeps`, S = scaling / (1 - dropout) * drop(x) lora_aᵀ
    [M, rank] in `lora_dtype`, else an empty tensor. source: of records, as in `selection`."""
    spec = linear_spec(
        *(format, n, k, block_size, scaling, dropout, stream),
        *(compute_dtype, lora_dtype, out_dtype),
    )
    x_rows = x.reshape(-1, k)
    low_rank = None
    if keeps and lora_a is not None:
        low_rank = x.new_empty(x_rows.shape[0], lora_a.shape[0], dtype=lora_dtype)
    tensors = LinearTensors(x_rows, planes, bias, lora_a, lora_b, seed, low_rank)
    with torch.autocast(x.device.type, enabled=False):
        choice = select(linear_problem("forward", x_rows.shape[0], tensors, spec), source)
        y = choice.variant.forward(tensors, spec, choice.config)
    return _shaped(y, (*x.shape[:-1], n)), x.new_empty(0) if low_rank is None else low_rank


def _shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """`rows` in another shape, and no view of them: autograd lets nobody write to a view that an
    op made, as a model may to a Linear's output (`hidden += residual`)."""
    return torch.ops.aten._unsafe_view(rows, shape)


@qlora_linear_forward.register_fake
def _(x, planes, bias, lora_a, lora_b, seed, keeps, source, format, n, k, *constants):
    y = x.new_empty((*x.shape[:-1], n), dtype=constants[-1])
    if not keeps:
        return y, x.new_empty(0)
    rows = x.numel() // k if k else 0
    return y, x.new_empty((rows, lora_a.shape[0]), dtype=constants[-2])


@torch.library.custom_op("qlora_compile::qlora_linear_backward", mutates_args=())
def qlora_linear_backward(
    grad: Tensor,
    x: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    low_rank: Tensor | None,
    needs_x: bool,
    needs_adapter: bool,
    needs_bias: bool,
    source: str,
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
) -> list[Tensor]:
    """The needed ones of [grad x, grad lora_a, grad lora_b, grad bias], in that order."""
    spec = linear_spec(
        *(format, n, k, block_size, scaling, dropout, stream),
        *(compute_dtype, lora_dtype, out_dtype),
    )
    tensors = LinearTensors(x.reshape(-1, k), planes, bias, lora_a, lora_b, seed, low_rank)
    needs = NeedsGradient(needs_x, needs_adapter, needs_bias)
    with torch.autocast(x.device.type, enabled=False):
        choice = select(linear_problem("backward", tensors.x.shape[0], tensors, spec), source)
        grads = choice.variant.backward(grad.reshape(-1, n), tensors, spec, needs, choice.config)
    grad_x = None if grads.x is None else _shaped(grads.x, x.shape)
    return [g for g in (grad_x, grads.lora_a, grads.lora_b, grads.bias) if g is not None]


@qlora_linear_backward.register_fake
def _(grad, x, planes, bias, lora_a, lora_b, seed, low_rank, *constants):
    needs_x, needs_adapter, needs_bias = constants[:3]
    needed = (needs_x, needs_adapter, needs_adapter, needs_bias)
    return [
        tensor.new_empty(tensor.shape)
        for tensor, need in zip((x, lora_a, lora_b, bias), needed, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output) -> None:
    x, planes, bias, lora_a, lora_b, seed, keeps, *ctx.constants = inputs
    # x, handles to the packed weight, the small adapter and perhaps S [M, rank]: nothing else of
    # [M, K], [M, N] or [N, K] is kept.
    ctx.plane_count = len(planes)
    low_rank = output[1] if keeps else None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias, lora_a, lora_b, seed, low_rank, *planes)


def _backward(ctx, grad, _):
    x, bias, lora_a, lora_b, seed, low_rank, *planes = ctx.saved_tensors
    needs_x, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
    needs_adapter = needs_a or needs_b
    if grad is None or not (needs_x or needs_adapter or needs_bias):
        return (None,) * len(ctx.needs_input_grad)
    grads = iter(
        qlora_linear_backward(
            grad,
            x,
            planes,
            bias,
            lora_a,
            lora_b,
            seed,
            low_rank,
            needs_x,
            needs_adapter,
            needs_bias,
            *ctx.constants,
        )
    )
    grad_x = next(grads) if needs_x else None
    grad_a, grad_b = (next(grads), next(grads)) if needs_adapter else (None, None)
    grad_bias = next(grads) if needs_bias else None
    frozen = [None] * ctx.plane_count
    # Those of seed, keeps and the constants.
    constants = (None,) * (2 + len(ctx.constants))
    return (grad_x, frozen, grad_bias, grad_a, grad_b, *constants)


qlora_linear_forward.register_autograd(_backward, setup_context=_setup_context)


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
