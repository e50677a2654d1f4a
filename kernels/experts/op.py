"""`qlora_compile::qlora_experts`: the linear of all experts, with their LoRA, as one op of the form
that `qlora_linear` has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.call import Call, LinearCall, NeedsGradient
from qlora_compile.kernels.experts.base import ExpertsProblem, ExpertsSpec, ExpertsTensors
from qlora_compile.kernels.experts.registry import choose
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.library import OpFunction, register
from qlora_compile.kernels.linear_call import places, problem_of, specs
from qlora_compile.kernels.problem import Direction


def experts_spec(call: Call) -> ExpertsSpec:
    """The constants of an experts' Call as variants take them."""
    (spec,) = specs(call)
    return ExpertsSpec(
        layout=spec.layout,
        experts=call.experts,
        compute_dtype=spec.compute_dtype,
        out_dtype=spec.out_dtype,
    )


def experts_tensors(call: Call, x: Tensor, tensors: Sequence[Any]) -> ExpertsTensors:
    """The tensors of an experts' Call by their names: first the offsets, then as `places` tells."""
    offsets, *others = tensors
    (place,) = places(call)

    def at(index: int | None) -> Any:
        return None if index is None else others[index]

    return ExpertsTensors(
        x=x,
        offsets=offsets,
        planes=others[place.planes],
        bias=at(place.bias),
        lora_a=at(place.lora_a),
        lora_b=at(place.lora_b),
        scaling=at(place.scaling),
    )


def experts_problem(call: Call, direction: Direction, rows: int, x: Tensor) -> ExpertsProblem:
    """The Problem of an experts' Call in one direction, for `rows` rows of all experts together."""
    problem = problem_of(call, direction, rows, x)
    return ExpertsProblem(
        direction=direction,
        m=problem.m,
        experts=call.experts,
        layout=problem.layout,
        rank=problem.rank,
        x_dtype=problem.x_dtype,
        compute_dtype=problem.compute_dtype,
        out_dtype=problem.out_dtype,
        bias=problem.bias,
        device=problem.device,
    )


def _forward(x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str) -> list[Tensor]:
    """[y] of shape [S, N]: for the rows of expert e, which end at offsets[e],
    y = x @ dequant(W)[e]ᵀ + bias[e] + scaling * x lora_a[e]ᵀ lora_b[e]ᵀ; zero past the last offset.

    Shapes as in `ExpertsTensors`. Products run in the compute dtype; casts happen inside. W and
    bias are frozen. seed: None, as nothing is dropped out here.
    """
    call = Call.parse(text)
    with torch.autocast(x.device.type, enabled=False):
        choice = choose(experts_problem(call, "forward", x.shape[0], x))
        return [choice.variant.forward(experts_tensors(call, x, tensors), experts_spec(call))]


def _fake_forward(
    x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    call = Call.parse(text)
    return [x.new_empty((x.shape[0], experts_spec(call).n), dtype=call.out_dtype)]


def _backward(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    """The needed ones of [grad x, grad lora_a, grad lora_b], in that order, contiguous."""
    call = Call.parse(text)
    with torch.autocast(x.device.type, enabled=False):
        choice = choose(experts_problem(call, "backward", x.shape[0], x))
        found = choice.variant.backward(
            grads[0],
            experts_tensors(call, x, tensors),
            experts_spec(call),
            needs_x=call.needs.x,
            needs_adapter=call.needs.adapter,
        )
    return [grad for grad in (found.x, found.lora_a, found.lora_b) if grad is not None]


def _fake_backward(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    call = Call.parse(text)
    own = experts_tensors(call, x, tensors)
    factors = (own.lora_a, own.lora_b) if call.needs.adapter else ()
    needed = [x] * call.needs.x + [factor for factor in factors if factor is not None]
    return [tensor.new_empty(tensor.shape) for tensor in needed]


class _Experts(OpFunction):
    """Saves x and handles to what is stored anyway; the low-rank product is computed again."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, ctx.text, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, seed, *tensors = ctx.saved_tensors
        _, _, _, needs_x, _, *needs = ctx.needs_input_grad
        call = Call.parse(ctx.text)
        (place,) = places(call)
        # Behind the offsets.
        factors = [] if place.lora_a is None else [place.lora_a + 1, place.lora_a + 2]
        needs_adapter = any(needs[i] for i in factors)
        results: list[Tensor | None] = [None] * len(tensors)
        if not (needs_x or needs_adapter):
            return None, None, None, None, None, *results
        call = replace(call, needs=NeedsGradient(needs_x, needs_adapter))
        found = iter(QLORA_EXPERTS_BACKWARD(list(grads), x, tensors, seed, str(call)))
        grad_x = next(found) if needs_x else None
        for i, each in zip(factors, found, strict=False):
            results[i] = each
        return None, None, None, grad_x, None, *results


QLORA_EXPERTS = register("qlora_experts", _forward, _fake_forward, _Experts)
QLORA_EXPERTS_BACKWARD = register("qlora_experts_backward", _backward, _fake_backward)


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
    """y [S, N] of x [S, K] in `dtype`, whose rows are sorted by expert and end at `offsets` [E].

    layout: the text of the Layout of all experts' weights, [E * N, K]. adapter: lora_a, lora_b and
    scaling.
    """
    rank = 0 if adapter is None else adapter[0].shape[1]
    text = _text(layout, bias is not None, rank, offsets.shape[0], dtype)
    others = [*([] if bias is None else [bias]), *(adapter or ())]
    return QLORA_EXPERTS(x, [offsets, *planes, *others], None, text)[0]


# Dynamo traces neither caches nor JSON; the text depends on nothing but constants.
@torch.compiler.assume_constant_result
def _text(*constants: Any) -> str:
    return _cached_text(*constants)


@functools.lru_cache(maxsize=4096)
def _cached_text(layout: str, bias: bool, rank: int, experts: int, dtype: torch.dtype) -> str:
    linear = LinearCall(Layout.parse(layout), bias, rank)
    return str(Call((linear,), dtype, dtype, dtype, experts=experts))
