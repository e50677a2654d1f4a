"""`qlora_compile::attention`: scaled dot-product attention on CPUs and its gradients, by our own
kernels where they are faster than torch's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.cpu import attention as cpu_attention
from qlora_compile.kernels.cpu.slow_products import is_looped
from qlora_compile.kernels.library import LIBRARY, OpFunction, register

TORCH_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""Torch's function, which the op replaces."""

_TORCH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def expected(*operands: Tensor) -> bool:
    """Whether our gradients are computed faster than torch's for such operands."""
    return cpu_attention.expected(*operands) or _widens(*operands)


def _widens(*operands: Tensor) -> bool:
    """Whether torch computes the gradients of such operands faster in float32: in 16 bits without
    instructions for them, they take 4 to 9 times as long on AVX2."""
    kinds = {(each.device.type, each.dtype) for each in operands}
    return len(kinds) == 1 and is_looped(operands[0])


def attention_call(is_causal: bool, scale: float | None) -> str:
    """Return the text of a call; without a scale, the scale is 1 / √D."""
    return json.dumps([is_causal, scale])


def read_attention_call(text: str) -> tuple[bool, float | None]:
    """Read what `attention_call` has written."""
    is_causal, scale = parsed_json(text)
    return is_causal, scale


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, call: str
) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention` without dropout.

    The operands must be `expected`, and such as torch's flash attention for CPUs takes; `attn_mask`
    has no gradient.

    query: bfloat16 [B, H, M, D]. key, value: bfloat16 [B, G, N, D], G a divisor of H.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        lowest = query.new_zeros(()).fill_(-math.inf)
        attn_mask = torch.where(attn_mask, query.new_zeros(()), lowest)
    others = [key, value] if attn_mask is None else [key, value, attn_mask]
    return ATTENTION_FORWARD(query, others, None, call)[0]


def _options(query: Tensor, mask: Sequence[Tensor], text: str) -> dict[str, Any]:
    """Return the arguments of torch's ops that concern the scores. mask: none or one."""
    is_causal, scale = read_attention_call(text)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return {"is_causal": is_causal, "attn_mask": mask[0] if mask else None, "scale": scale}


def _forward(query: Tensor, tensors: Sequence[Tensor], seed: None, text: str) -> list[Tensor]:
    """Return the attention [B, H, M, D] and the logarithm of each row's sum, float32 [B, H, M].

    tensors: key, value and a mask, if there is one.
    """
    key, value, *mask = tensors
    if cpu_attention.computes(query, key, value):
        return list(cpu_attention.attention(query, key, value, **_options(query, mask, text)))
    return _torch_forward(query, tensors, seed, text)


def _torch_forward(query: Tensor, tensors: Sequence[Tensor], seed: None, text: str) -> list[Tensor]:
    key, value, *mask = tensors
    return list(TORCH_FORWARD(query, key, value, 0.0, **_options(query, mask, text)))


def _backward(
    grads: Sequence[Tensor], query: Tensor, tensors: Sequence[Tensor], seed: None, text: str
) -> list[Tensor]:
    """Return the gradients of query, key and value; torch's where ours are not available.

    tensors: the forward's, then its results.
    """
    (grad,), (key, value, *mask, out, log_sum) = grads, tensors
    operands, options = (query, key, value, out, log_sum), _options(query, mask, text)
    if cpu_attention.available(grad, query, key, value):
        return list(cpu_attention.gradients(grad, *operands, **options))
    inputs = [grad, *operands]
    if _widens(grad, query, key, value):
        inputs = [each.float() for each in inputs]
        options["attn_mask"] = mask[0].float() if mask else None
    found = _TORCH_BACKWARD(*inputs, dropout_p=0.0, **options)
    # In the dtypes and strides that `_fake_backward` has told.
    return [torch.empty_like(like).copy_(each) for like, each in zip(operands, found, strict=False)]


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


ATTENTION_FORWARD = register("attention_forward", _forward, _torch_forward, _Attention)
ATTENTION_BACKWARD = register("attention_backward", _backward, _fake_backward)

LIBRARY.define(attention.__name__ + torch.library.infer_schema(attention, mutates_args=()))
LIBRARY.impl(attention.__name__, attention, "CompositeImplicitAutograd")

ATTENTION = torch.ops.qlora_compile.attention.default
"""The op as it appears in a graph."""
