"""Cross-entropy of an output head straight from its input, without the logits of all rows.

At a vocabulary of 128 000 the logits, their float32 copy and their gradient are by far the largest
tensors of a training step. Here they exist for a few rows at a time, in which the gradients are
computed too; the backward only scales these (as in Liger Kernel's fused linear cross-entropy).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_compile.errors import LabelRangeError, OptionError
from qlora_compile.kernels.head_sweep import HeadSettings, Sweep, asked_dtype
from qlora_compile.kernels.packed import PackedWeight


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
    vocabulary_chunk: int | None = None,
) -> Tensor:
    """Return `cross_entropy(f(hidden weightᵀ + bias + scaling * hidden lora_aᵀ lora_bᵀ), labels)`,
    with f(z) = logit_scale * z, or softcap * tanh(logit_scale * z / softcap).

    hidden: [M, K]; weight: [V, K], packed or not; labels: int64 [M], each in [0, V) or
    `ignore_index`; bias: [V]; lora_a: [R, K]; lora_b: [V, R]. The base product runs in hidden's
    dtype, or in autocast's if that is on; everything else runs in float32 (float64 for float64),
    which is the dtype of the loss []. Tensors that require a gradient get it in their own dtypes.
    If all labels are ignored, the mean is NaN, as in torch, and gradients are 0.

    chunk, vocabulary_chunk: how many rows, and entries of the vocabulary, have logits at a time;
    None for so many that a chunk is no larger than `hidden`. The vocabulary is split only if the
    weight has to be decoded or cast for the product; then every product is computed twice.

    Raises OptionError for an unknown reduction and LabelRangeError for a label out of range (on a
    GPU the device's own assertion fails instead, as in torch's cross_entropy).
    """
    if reduction not in ("mean", "sum"):
        raise OptionError(option="reduction", value=reduction, known="'mean', 'sum'")
    packed = weight if isinstance(weight, PackedWeight) else None
    size = weight.shape[0]
    _check_labels(labels, size, ignore_index)
    settings = HeadSettings(
        packed=packed,
        size=size,
        compute=asked_dtype(hidden),
        scaling=scaling,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        mean=reduction == "mean",
        chunk=chunk,
        vocabulary_chunk=vocabulary_chunk,
        differentiates=torch.is_grad_enabled(),
    )
    plain = None if packed is not None else weight
    return _HeadLoss.apply(hidden, plain, bias, lora_a, lora_b, labels, settings)


def _check_labels(labels: Tensor, size: int, ignore_index: int) -> None:
    kept = labels.masked_fill(labels == ignore_index, 0)
    if labels.device.type != "cpu":
        # This fails on the device; a check on the host would wait for the device.
        torch.zeros(1, device=labels.device).expand(size).index_select(0, kept)
        return
    wrong = labels[(kept < 0) | (kept >= size)]
    if wrong.numel():
        raise LabelRangeError(value=int(wrong[0]), size=size, ignored=ignore_index)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        labels: Tensor,
        settings: HeadSettings,
    ) -> Tensor:
        tensors = (hidden, weight, bias, lora_a, lora_b)
        needs = [settings.differentiates and need for need in ctx.needs_input_grad[:5]]
        with torch.autocast(hidden.device.type, enabled=False):
            sweep = Sweep(tensors, needs, labels, settings)
            loss, gradients = sweep.run()
            count = sweep.valid.sum()
        ctx.mean = settings.mean
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.save_for_backward(count, *gradients)
        return loss / count if settings.mean else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        count, *gradients = ctx.saved_tensors
        # Only here are they divided by the number of rows: float16 would have lost small ones
        # before a gradient scaler's factor could save them.
        scale = grad_outputs[0] / count.clamp(min=1) if ctx.mean else grad_outputs[0]
        scaled = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)
