"""`qlora_compile::attention`: scaled dot-product attention with torch's forward for CPUs and a
backward of ours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlora_compile.kernels.cpu import attention as cpu_attention

TORCH_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""What torch computes where the op stands in for it."""

_TORCH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def expected(*operands: Tensor) -> bool:
    """Whether there is a backward of ours for operands of such dtypes and devices, if the compiler
    builds it."""
    return cpu_attention.expected(*operands)


def start() -> None:
    """Has that built while this thread goes on."""
    cpu_attention.start()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without dropout, for operands that torch
    has its flash attention for CPUs for and that are `expected`; `attn_mask` has no gradient.

    query: bfloat16 [B, H, M, D]. key, value: bfloat16 [B, G, N, D], G a divisor of H.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        lowest = query.new_zeros(()).fill_(-math.inf)
        attn_mask = torch.where(attn_mask, query.new_zeros(()), lowest)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attention_forward(query, key, value, attn_mask, is_causal, scale)[0]


@torch.library.custom_op("qlora_compile::attention_forward", mutates_args=())
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, M, D] and float32 [B, H, M], the logarithm of each row's sum."""
    return TORCH_FORWARD(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)


@attention_forward.register_fake
def _(query, key, value, mask, is_causal, scale):
    return TORCH_FORWARD(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)


@torch.library.custom_op("qlora_compile::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; where ours is not available, by torch."""
    operands = (grad, query, key, value, out, log_sum)
    if cpu_attention.available(grad, query, key, value):
        return cpu_attention.gradients(*operands, mask, is_causal=is_causal, scale=scale)
    return _TORCH_BACKWARD(*operands, 0.0, is_causal, attn_mask=mask, scale=scale)


@attention_backward.register_fake
def _(grad, query, key, value, mask, out, log_sum, is_causal, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx, inputs, output) -> None:
    *operands, ctx.is_causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*operands, *output)


def _backward(ctx, grad, _):
    grads = attention_backward(grad, *ctx.saved_tensors, ctx.is_causal, ctx.scale)
    return *grads, None, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)

_LIBRARY = torch.library.Library("qlora_compile", "FRAGMENT")
_LIBRARY.define(attention.__name__ + torch.library.infer_schema(attention, mutates_args=()))
_LIBRARY.impl(attention.__name__, attention, "CompositeImplicitAutograd")

ATTENTION = torch.ops.qlora_compile.attention.default
"""The op as it appears in a graph."""
