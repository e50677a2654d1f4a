"""`qlora_compile::qlora_experts`: the linear of all experts, with their LoRA, as one op with the
arguments of `qlora_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.call import Call
from qlora_compile.kernels.experts.base import ExpertsProblem, ExpertsSpec, ExpertsTensors
from qlora_compile.kernels.experts.registry import choose
from qlora_compile.kernels.linear_call import bound, problem_of
from qlora_compile.kernels.op import register_fused, text_of_one
from qlora_compile.kernels.problem import Direction


def bound_experts(
    call: Call, x: Tensor, tensors: Sequence[Tensor]
) -> tuple[ExpertsTensors, ExpertsSpec]:
    """Return the tensors of an experts' Call by their names, and its constants. tensors: the
    offsets come first, then the others in the order of `tensor_indices`."""
    ((own, spec),) = bound(call, x, tensors, None)
    return (
        ExpertsTensors(**vars(own), offsets=tensors[0]),
        ExpertsSpec(**vars(spec), experts=call.experts),
    )


def experts_problem(call: Call, direction: Direction, rows: int, x: Tensor) -> ExpertsProblem:
    """Return the Problem of an experts' Call in one direction, for `rows` rows of all experts
    together."""
    return ExpertsProblem(**vars(problem_of(call, direction, rows, x)), experts=call.experts)


def _forward(x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str) -> list[Tensor]:
    """Return [y], y of shape [S, N]: for the rows of expert e, which end at offsets[e],
    y = x @ dequant(W)[e]ᵀ + bias[e] + scaling * x lora_a[e]ᵀ lora_b[e]ᵀ; zero past the last offset.

    Shapes as in `ExpertsTensors`. Products run in the compute dtype; casts happen inside. W and
    bias are frozen. seed: None, as nothing is dropped out here.
    """
    call = Call.parse(text)
    with torch.autocast(x.device.type, enabled=False):
        choice = choose(experts_problem(call, "forward", x.shape[0], x))
        return [choice.variant.forward(*bound_experts(call, x, tensors))]


def _backward(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    """Return those of [grad x, grad lora_a, grad lora_b] that are needed, contiguous."""
    call = Call.parse(text)
    with torch.autocast(x.device.type, enabled=False):
        choice = choose(experts_problem(call, "backward", x.shape[0], x))
        found = choice.variant.backward(grads[0], *bound_experts(call, x, tensors), call.needs)
    return [grad for grad in (found.x, found.lora_a, found.lora_b) if grad is not None]


QLORA_EXPERTS: Any = register_fused("qlora_experts", _forward, _backward)
"""The op as it appears in a graph."""


def experts_linear(
    x: Tensor,
    offsets: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    layout: str,
    *,
    adapter: tuple[Tensor, Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return y [S, N] of x [S, K] in `dtype`, whose rows are sorted by expert and end at `offsets`
    [E].

    layout: the text of the Layout of all experts' weights, [E * N, K]. adapter: lora_a, lora_b and
    scaling.
    """
    rank = 0 if adapter is None else adapter[0].shape[1]
    text = text_of_one(layout, bias is not None, rank, dtype, dtype, offsets.shape[0])
    others = [*([] if bias is None else [bias]), *(adapter or ())]
    return QLORA_EXPERTS(x, [offsets, *planes, *others], None, text)[0]
