"""`qlora_compile::qlora_experts`: the linear of all experts, with their LoRA, as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.experts.base import ExpertsProblem, ExpertsSpec, ExpertsTensors
from qlora_compile.kernels.experts.registry import choose
from qlora_compile.kernels.formats.formats import UNQUANTIZED, format_named
from qlora_compile.kernels.problem import Direction, bucket_rows


def experts_spec(format: str, *constants: Any) -> ExpertsSpec:
    """The spec of a call, from `qlora_experts`' arguments behind its tensors."""
    return ExpertsSpec(None if format == UNQUANTIZED else format_named(format), *constants)


def experts_problem(
    direction: Direction, rows: int, tensors: ExpertsTensors, spec: ExpertsSpec
) -> ExpertsProblem:
    return ExpertsProblem(
        direction=direction,
        m=bucket_rows(rows),
        experts=tensors.experts,
        n=spec.n,
        k=spec.k,
        rank=0 if tensors.lora_a is None else tensors.lora_a.shape[1],
        format=UNQUANTIZED if spec.format is None else spec.format.name,
        block_size=spec.block_size,
        double_quantized=len(tensors.planes) > 2,
        x_dtype=tensors.x.dtype,
        compute_dtype=spec.compute_dtype,
        out_dtype=spec.out_dtype,
        bias=tensors.bias is not None,
        device=str(tensors.x.device),
    )


# No defaults in the schemas, as in kernels/op.py.
@torch.library.custom_op("qlora_compile::qlora_experts", mutates_args=())
def qlora_experts(
    x: Tensor,
    offsets: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    format: str,
    n: int,
    k: int,
    block_size: int,
    scaling: float,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [S, n] in `out_dtype`: for the rows of expert e, which end at offsets[e],
    y = x @ dequant(W)[e]ᵀ + bias[e] + scaling * x lora_a[e]ᵀ lora_b[e]ᵀ; zero past the last offset.

    Shapes as in `ExpertsTensors`. Products run in `compute_dtype`; casts happen inside. W and bias
    are frozen.
    """
    spec = experts_spec(format, n, k, block_size, scaling, compute_dtype, out_dtype)
    tensors = ExpertsTensors(x, offsets, planes, bias, lora_a, lora_b)
    with torch.autocast(x.device.type, enabled=False):
        choice = choose(experts_problem("forward", x.shape[0], tensors, spec))
        return choice.variant.forward(tensors, spec)


QLORA_EXPERTS = torch.ops.qlora_compile.qlora_experts.default
"""The op as it appears in a graph."""


@qlora_experts.register_fake
def _(x, offsets, planes, bias, lora_a, lora_b, format, n, k, *constants):
    return x.new_empty((x.shape[0], n), dtype=constants[-1])


@torch.library.custom_op("qlora_compile::qlora_experts_backward", mutates_args=())
def qlora_experts_backward(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    needs_x: bool,
    needs_adapter: bool,
    format: str,
    n: int,
    k: int,
    block_size: int,
    scaling: float,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """The needed ones of [grad x, grad lora_a, grad lora_b], in that order, contiguous."""
    spec = experts_spec(format, n, k, block_size, scaling, compute_dtype, out_dtype)
    tensors = ExpertsTensors(x, offsets, planes, bias, lora_a, lora_b)
    with torch.autocast(x.device.type, enabled=False):
        choice = choose(experts_problem("backward", x.shape[0], tensors, spec))
        grads = choice.variant.backward(
            grad, tensors, spec, needs_x=needs_x, needs_adapter=needs_adapter
        )
    return [g for g in (grads.x, grads.lora_a, grads.lora_b) if g is not None]


@qlora_experts_backward.register_fake
def _(grad, x, offsets, planes, bias, lora_a, lora_b, needs_x, needs_adapter, *constants):
    needed = ((x, needs_x), (lora_a, needs_adapter), (lora_b, needs_adapter))
    return [tensor.new_empty(tensor.shape) for tensor, need in needed if need]


def _setup_context(ctx, inputs, output) -> None:
    # x and handles to what is stored anyway; the low-rank product is computed again.
    x, offsets, planes, bias, lora_a, lora_b, *ctx.constants = inputs
    ctx.plane_count = len(planes)
    ctx.save_for_backward(x, offsets, bias, lora_a, lora_b, *planes)


def _backward(ctx, grad):
    x, offsets, bias, lora_a, lora_b, *planes = ctx.saved_tensors
    needs_x, _, _, _, needs_a, needs_b = ctx.needs_input_grad[:6]
    needs_adapter = needs_a or needs_b
    unneeded = (None,) * len(ctx.constants)
    frozen = [None] * ctx.plane_count
    if not (needs_x or needs_adapter):
        return (None, None, frozen, None, None, None, *unneeded)
    tensors = (grad, x, offsets, planes, bias, lora_a, lora_b)
    grads = iter(qlora_experts_backward(*tensors, needs_x, needs_adapter, *ctx.constants))
    grad_x = next(grads) if needs_x else None
    grad_a, grad_b = (next(grads), next(grads)) if needs_adapter else (None, None)
    return (grad_x, None, frozen, None, grad_a, grad_b, *unneeded)


qlora_experts.register_autograd(_backward, setup_context=_setup_context)
