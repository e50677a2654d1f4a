"""Specification of our ops: plain products of the decoded weight, without the kernels that are to
be checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.attention import ATTENTION, read_attention_call
from qlora_compile.kernels.call import Call
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.experts.op import QLORA_EXPERTS, bound_experts
from qlora_compile.kernels.formats.formats import format_of
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.linear_call import bound
from qlora_compile.kernels.op import QLORA_LINEAR


def linear_reference(
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout: float = 0.0,
    keep: Tensor | None = None,
    product: Callable[[Tensor, Any, Tensor | None], Tensor] = torch.nn.functional.linear,
) -> Tensor:
    """Return y = x Wᵀ + bias + scaling * (keep ⊙ x / (1 - dropout)) Aᵀ Bᵀ (LoRA, Hu et al. 2021).

    x [..., K], weight [N, K] (dequantised), lora_a [R, K], lora_b [N, R], keep bool [..., K]. Every
    product runs in the dtype of its weights, and the sum in the wider dtype, as in PEFT: pass
    float64 for a reference, low precisions for the plain computation whose error bounds a
    variant's. product: how x is multiplied by `weight`, which may then be of any type.
    """
    y = product(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    adapted = _dropped(x.to(lora_a.dtype), keep, dropout)
    return y + scaling * (adapted @ lora_a.T @ lora_b.T)


def specified_linears(
    wide: torch.dtype | None, x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    """Compute `qlora_linear` by its specification, in its own dtypes or `wide`."""
    call = Call.parse(text)
    results, low_ranks = [], []
    with torch.autocast(x.device.type, enabled=False):
        for own, spec in bound(call, x, tensors, seed):
            dtype, lora_dtype = wide or spec.compute_dtype, wide or spec.lora_dtype
            keep = None if own.seed is None else _keep(x, own.seed, spec.stream, spec.dropout)
            a, b, scaling = (
                None if each is None else each.to(lora_dtype)
                for each in (own.lora_a, own.lora_b, own.scaling)
            )
            y = linear_reference(
                x.to(dtype),
                partial(_decoded, own.planes, spec.layout, (spec.n, spec.k), dtype),
                None if own.bias is None else own.bias.to(dtype),
                *(a, b),
                scaling=1.0 if scaling is None else scaling,
                dropout=spec.dropout,
                keep=keep,
                product=_product,
            )
            if a is not None and scaling is not None and call.save_low_rank:
                dropped = _dropped(x.detach().to(lora_dtype), keep, spec.dropout)
                low_ranks.append((scaling * (dropped @ a.detach().T)).reshape(-1, len(a)))
            results.append(y.to(wide or spec.out_dtype))
    return [*results, torch.cat(low_ranks, dim=1)] if call.save_low_rank else results


def dropped_out(x: Tensor, seed: Tensor, stream: int, probability: float) -> Tensor:
    """Return x [..., K] with the mask of a fused op; seed: int64 [1]."""
    return _dropped(x, _keep(x, seed, stream, probability), probability)


def _keep(x: Tensor, seed: Tensor, stream: int, probability: float) -> Tensor:
    rows = x.numel() // x.shape[-1]
    return keep_mask(seed, stream, probability, (0, rows), x.shape[-1]).view(x.shape)


def _dropped(x: Tensor, keep: Tensor | None, probability: float) -> Tensor:
    return x if keep is None else x * keep / (1.0 - probability)


def _product(x: Tensor, decode: Any, bias: Tensor | None) -> Tensor:
    return _Linear.apply(x, bias, decode)


class _Linear(torch.autograd.Function):
    """y = x @ Wᵀ + bias, where W is the result of `decode` and exists only during products."""

    @staticmethod
    def forward(ctx, x, bias, decode):
        ctx.decode, ctx.has_bias = decode, bias is not None
        return torch.nn.functional.linear(x, decode(), bias)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
        return grad @ ctx.decode(), bias, None


def specified_experts(
    wide: torch.dtype | None, x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    """Compute `qlora_experts` by its specification, in its own dtypes or `wide`."""
    call = Call.parse(text)
    own, spec = bound_experts(call, x, tensors)
    dtype = wide or spec.compute_dtype
    shape = (spec.experts, spec.n, spec.k)
    groups = list(own.groups())
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        y = _Experts.apply(
            x, groups, spec.n, partial(_decoded, own.planes, spec.layout, shape, dtype)
        )
        parts = []
        for expert, rows in groups:
            part = y[rows]
            if own.bias is not None:
                part = part + own.bias[expert].to(dtype)
            if own.lora_a is not None and own.lora_b is not None and own.scaling is not None:
                low_rank = x[rows] @ own.lora_a[expert].to(dtype).T
                part = part + own.scaling.to(dtype) * (low_rank @ own.lora_b[expert].to(dtype).T)
            parts.append(part)
        served = sum(rows.stop - rows.start for _, rows in groups)
        return [torch.cat([*parts, y[served:]]).to(wide or spec.out_dtype)]


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
    planes: Sequence[Tensor], layout: Layout, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    quant_format = format_of(layout)
    if quant_format is None:
        return planes[0].to(dtype)
    # The planes may have been widened with all the other inputs; their values are in the dtypes
    # that the format declares.
    declared = quant_format.planes(layout)
    stored = [each.to(plane.dtype) for each, plane in zip(planes, declared, strict=True)]
    packed = quant_format.packed(layout, stored)
    # A value is computed in float32, so that float64 adds no rounding.
    exact = torch.float32 if dtype == torch.float64 else dtype
    return quant_format.dequantize(packed, exact).to(dtype).view(shape)


def specified_attention(
    wide: torch.dtype | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    text: str,
) -> Tensor:
    """Compute `attention` by its specification, in its own dtype or `wide`."""
    is_causal, scale = read_attention_call(text)
    query, key, value = (each.to(wide or each.dtype) for each in (query, key, value))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(wide or query.dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )


SPECIFIED: dict[Any, Callable[..., Any]] = {
    QLORA_LINEAR: specified_linears,
    QLORA_EXPERTS: specified_experts,
    ATTENTION: specified_attention,
}
"""Our ops that a graph may hold, and what replaces them in a check."""
