"""`qlora_compile::attention`: scaled dot-product attention with torch's forward for CPUs and a
backward of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.cpu import attention as cpu_attention
from qlora_compile.kernels.library import LIBRARY, OpFunction, register

TORCH_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""What torch computes where the op stands in for it."""

_TORCH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


expected = cpu_attention.expected


def attention_call(is_causal: bool, scale: float | None) -> str:
    """The text of a call; without a scale, of 1 / √D."""
    return json.dumps([is_causal, scale])


def read_attention_call(text: str) -> tuple[bool, float | None]:
    """What `attention_call` wrote."""
    is_causal, scale = parsed_json(text)
    return is_causal, scale


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, call: str
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without dropout, for operands that torch
    has its flash attention for CPUs for and that are `expected`; `attn_mask` has no gradient.

    query: bfloat16 [B, H, M, D]. key, value: bfloat16 [B, G, N, D], G a divisor of H.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        lowest = query.new_zeros(()).fill_(-math.inf)
        attn_mask = torch.where(attn_mask, query.new_zeros(()), lowest)
    others = [key, value] if attn_mask is None else [key, value, attn_mask]
    return ATTENTION_FORWARD(query, others, None, call)[0]


def _options(query: Tensor, mask: Sequence[Tensor], text: str) -> dict[str, Any]:
    """What torch's ops are told of the scores. mask: none or one."""
    is_causal, scale = read_attention_call(text)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return {"is_causal": is_causal, "attn_mask": mask[0] if mask else None, "scale": scale}


def _forward(query: Tensor, tensors: Sequence[Tensor], seed: None, text: str) -> list[Tensor]:
    """Attention [B, H, M, D] and float32 [B, H, M], the logarithm of each row's sum. tensors: key,
    value and a mask, if there is one."""
    key, value, *mask = tensors
    return list(TORCH_FORWARD(query, key, value, 0.0, **_options(query, mask, text)))


def _backward(
    grads: Sequence[Tensor], query: Tensor, tensors: Sequence[Tensor], seed: None, text: str
) -> list[Tensor]:
    """The gradients of query, key and value; where ours is not available, by torch. tensors: the
    forward's, then its results."""
    (grad,), (key, value, *mask, out, log_sum) = grads, tensors
    operands, options = (query, key, value, out, log_sum), _options(query, mask, text)
    if cpu_attention.available(grad, query, key, value):
        return list(cpu_attention.gradients(grad, *operands, **options))
    return list(_TORCH_BACKWARD(grad, *operands, dropout_p=0.0, **options))


def _fake_backward(
    grads: Sequence[Tensor], query: Tensor, tensors: Sequence[Tensor], seed: None, text: str
) -> list[Tensor]:
    return [torch.empty_like(each) for each in (query, *tensors[:2])]


class _Attention(OpFunction):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, ctx.text, query, _, *others = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, *others, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, *others = ctx.saved_tensors
        found = ATTENTION_BACKWARD([grads[0]], query, others, None, ctx.text)
        masks = len(others) - 4
        return None, None, None, found[0], None, *found[1:], *[None] * masks


ATTENTION_FORWARD = register("attention_forward", _forward, _forward, _Attention)
ATTENTION_BACKWARD = register("attention_backward", _backward, _fake_backward)

LIBRARY.define(attention.__name__ + torch.library.infer_schema(attention, mutates_args=()))
LIBRARY.impl(attention.__name__, attention, "CompositeImplicitAutograd")

ATTENTION = torch.ops.qlora_compile.attention.default
"""The op as it appears in a graph."""
