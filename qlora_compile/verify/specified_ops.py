"""Our ops as their formats specify them: by plain products of the decoded weight, and by none of
the kernels that are to be checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.attention import ATTENTION
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.experts.base import ExpertsSpec, ExpertsTensors
from qlora_compile.kernels.experts.op import QLORA_EXPERTS, experts_spec
from qlora_compile.kernels.linear_call import linear_spec
from qlora_compile.kernels.op import QLORA_LINEAR, QLORA_LINEAR_GROUP
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.variants.base import LinearSpec


def specified_linear(
    wide: torch.dtype | None,
    x: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    *constants: Any,
) -> Tensor:
    """`qlora_linear` by its specification, in its own dtypes or `wide`."""
    spec = linear_spec(*constants)
    dtype, lora_dtype = wide or spec.compute_dtype, wide or spec.lora_dtype
    with torch.autocast(x.device.type, enabled=False):
        factors = x.to(dtype), None if bias is None else bias.to(dtype)
        y = _Linear.apply(*factors, lambda: _decoded(planes, spec, (spec.n, spec.k), dtype))
        if lora_a is not None and lora_b is not None:
            adapted = x.to(lora_dtype)
            if seed is not None:
                adapted = dropped_out(adapted, seed, spec.stream, spec.dropout)
            low_rank = adapted @ lora_a.to(lora_dtype).T
            y = y + spec.scaling * (low_rank @ lora_b.to(lora_dtype).T)
        return y.to(wide or spec.out_dtype)


def specified_group(
    wide: torch.dtype | None,
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
    *dtypes: torch.dtype,
) -> list[Tensor]:
    """`qlora_linear_group` likewise, one Linear after the other."""
    count = len(planes) // len(n)
    return [
        specified_linear(
            *(wide, x, planes[i * count : (i + 1) * count], bias[i], lora_a[i], lora_b[i], seed),
            *(format, n[i], k, block_size, scaling[i], dropout, stream[i], *dtypes),
        )
        for i in range(len(n))
    ]


def dropped_out(x: Tensor, seed: Tensor, stream: int, probability: float) -> Tensor:
    """x [..., K] with the mask of a fused op; seed: int64 [1]."""
    rows = x.numel() // x.shape[-1]
    keep = keep_mask(seed, stream, probability, (0, rows), x.shape[-1]).view(x.shape)
    return x * keep / (1.0 - probability)


class _Linear(torch.autograd.Function):
    """y = x @ Wᵀ + bias. W, which `decode` gives, lives while it is multiplied with."""

    @staticmethod
    def forward(ctx, x, bias, decode):
        ctx.decode, ctx.has_bias = decode, bias is not None
        return torch.nn.functional.linear(x, decode(), bias)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
        return grad @ ctx.decode(), bias, None


def specified_experts(
    wide: torch.dtype | None,
    x: Tensor,
    offsets: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *constants: Any,
) -> Tensor:
    """`qlora_experts` by its specification, in its own dtypes or `wide`."""
    spec = experts_spec(*constants)
    dtype = wide or spec.compute_dtype
    tensors = ExpertsTensors(x, offsets, planes, bias, lora_a, lora_b)
    shape = (tensors.experts, spec.n, spec.k)
    groups = list(tensors.groups())
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        y = _Experts.apply(x, groups, spec.n, lambda: _decoded(planes, spec, shape, dtype))
        parts = []
        for expert, rows in groups:
            part = y[rows]
            if bias is not None:
                part = part + bias[expert].to(dtype)
            if lora_a is not None and lora_b is not None:
                low_rank = x[rows] @ lora_a[expert].to(dtype).T
                part = part + spec.scaling * (low_rank @ lora_b[expert].to(dtype).T)
            parts.append(part)
        served = sum(rows.stop - rows.start for _, rows in groups)
        return torch.cat([*parts, y[served:]]).to(wide or spec.out_dtype)


class _Experts(torch.autograd.Function):
    """y [S, n]: the rows of each expert times its Wᵀ of [E, n, k], as in `_Linear`; else zero."""

    @staticmethod
    def forward(ctx, x, groups, n, decode):
        ctx.groups, ctx.decode, weight = groups, decode, decode()
        y = x.new_zeros(x.shape[0], n)
        for expert, rows in groups:
            y[rows] = x[rows] @ weight[expert].T
        return y

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = ctx.decode()
        grad_x = grad.new_zeros(grad.shape[0], weight.shape[2])
        for expert, rows in ctx.groups:
            grad_x[rows] = grad[rows] @ weight[expert]
        return grad_x, None, None, None


def _decoded(
    planes: Sequence[Tensor],
    spec: LinearSpec | ExpertsSpec,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    if spec.format is None:
        return planes[0].to(dtype)
    # The planes may have been widened with all the other inputs; their values are float32's.
    stored = [plane.float() if plane.is_floating_point() else plane for plane in planes]
    rows = math.prod(shape[:-1])
    packed = PackedWeight.from_planes(spec.format.name, (rows, shape[-1]), spec.block_size, stored)
    # To float64 without another rounding: a value is a product in float32.
    exact = torch.float32 if dtype == torch.float64 else dtype
    return spec.format.dequantize(packed, exact).to(dtype).view(shape)


def specified_attention(
    wide: torch.dtype | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """`attention` by its specification, in its own dtype or `wide`."""
    query, key, value = (each.to(wide or each.dtype) for each in (query, key, value))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(wide or query.dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )


SPECIFIED: dict[Any, Callable[..., Any]] = {
    QLORA_LINEAR: specified_linear,
    QLORA_LINEAR_GROUP: specified_group,
    QLORA_EXPERTS: specified_experts,
    ATTENTION: specified_attention,
}
"""What a graph may hold of ours, and what stands for it in a check."""
