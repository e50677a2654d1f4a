"""Log-probabilities of labels, row by row, straight from an output head's input, on a CPU.

Losses of each row weigh them afterwards, as those of preference and policy optimisation do. A row's
gradient is its weight times a vector, which the forward computes while it has the logits, so that
no product of the backward repeats them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_compile.kernels.head_sweep import (
    HeadSettings,
    Sweep,
    asked_dtype,
    computed_in,
    fits_in_place,
)
from qlora_compile.kernels.layout import slices

_NO_LABEL = torch.iinfo(torch.int64).min
_ROWS = 256
"""Rows whose logits are made again at a time, for the gradient of the entropy."""


class LogProbs(NamedTuple):
    """What `head_log_probs` returns for every row: float32 [M], but is_first is bool [M].

    z is logit_scale * hidden weightᵀ, and p its softmax. log_probs: log p of the label. entropy:
    -Σ p log p. log_sum_squares: log Σ p². mean_logit: the mean of z. is_first: whether the label's
    z is the largest, and the first of equal ones. Only log_probs and entropy have gradients.
    """

    log_probs: Tensor
    entropy: Tensor
    log_sum_squares: Tensor
    mean_logit: Tensor
    is_first: Tensor


def computes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `head_log_probs` takes these. It needs a CPU, a C++ compiler, a weight that gets no
    gradient, and a product in bfloat16 of a bfloat16 weight, or in float32."""
    differentiates = torch.is_grad_enabled() and weight.requires_grad
    compute = computed_in(hidden, asked_dtype(hidden))
    return not differentiates and fits_in_place(hidden, weight, compute)


def head_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, logit_scale: float = 1.0
) -> LogProbs:
    """Return what `LogProbs` names. hidden: [M, K]. weight: [V, K]. labels: int64 [M]; one outside
    [0, V) has the logit 0 and no gradient of its own, as in TRL, whose trainers leave such rows out
    afterwards.

    The product runs in hidden's dtype, or in autocast's if that is on, everything else in float32.
    """
    values: Any = _HeadLogProbs.apply(hidden, weight, labels, logit_scale)
    return LogProbs(*values)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, logit_scale: float
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        settings = HeadSettings(
            packed=None,
            size=weight.shape[0],
            compute=asked_dtype(hidden),
            scaling=1.0,
            softcap=None,
            logit_scale=logit_scale,
            label_smoothing=0.0,
            ignore_index=_NO_LABEL,
            mean=False,
            chunk=None,
            vocabulary_chunk=None,
            differentiates=ctx.needs_input_grad[0],
        )
        needs = [ctx.needs_input_grad[0], *[False] * 4]
        with torch.autocast(hidden.device.type, enabled=False):
            sweep = Sweep(
                (hidden, weight, None, None, None), needs, labels, settings, detailed=True
            )
            _, (gradient, *_) = sweep.run()
        log_sum, target, total, entropy, squares, first = sweep.sums
        ctx.compute, ctx.logit_scale = sweep.compute, logit_scale
        ctx.save_for_backward(gradient, hidden, weight, log_sum, entropy)
        rest = squares.log(), total / weight.shape[0], first > 0
        ctx.mark_non_differentiable(*rest)
        return target - log_sum, entropy, *rest

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None, *_: Any
    ) -> Any:
        gradient, hidden, weight, log_sum, entropy = ctx.saved_tensors
        found = torch.zeros(hidden.shape, dtype=torch.float32)
        if by_log_prob is not None:
            found -= gradient * by_log_prob.unsqueeze(1)
        if by_entropy is not None:
            # d entropy / dz = -p (log p + entropy). Few losses need it: the logits are made again.
            weight = weight.to(ctx.compute)
            for rows in slices(len(hidden), _ROWS):
                z = (hidden[rows].to(ctx.compute) @ weight.t()).float().mul_(ctx.logit_scale)
                logarithm = z.sub_(log_sum[rows].unsqueeze(1))
                grad = logarithm.exp().mul_(logarithm.add_(entropy[rows].unsqueeze(1)))
                grad.mul_(-ctx.logit_scale * by_entropy[rows].unsqueeze(1))
                found[rows] += grad.to(ctx.compute) @ weight
        return found.to(hidden.dtype), None, None, None
