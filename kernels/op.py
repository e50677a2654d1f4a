"""`qlora_compile::qlora_linear`: the Linears of a Call, which share their input, as one op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.call import Call, LinearCall, NeedsGradient
from qlora_compile.kernels.cpu.tapes import repeated
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.library import OpFunction, register
from qlora_compile.kernels.linear_call import bound, problem_of, tensor_indices
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.selector import select, selector_named


def hinted_rows(x: Tensor, k: int) -> int:
    """Return the rows of x [..., k], with dynamic dimensions as they were at capture."""
    rows: Any = x.numel() // k if k else 0
    return rows if isinstance(rows, int) else rows.node.hint or 0


def _forward(x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str) -> list[Tensor]:
    """Return every y [..., N] of the Call, and last, if the Call saves it, S [M, sum of ranks].

    x [..., K]; tensors in the order of `tensor_indices`; seed: int64 [1] if there is dropout.
    """
    problem, choice = _chosen(text, "forward", x)
    compute = functools.partial(_forward_by, problem, choice)
    return repeated("qlora_linear", choice, compute, x, tensors, seed, text)


def _forward_by(
    problem: Problem,
    choice: Choice,
    x: Tensor,
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    text: str,
) -> list[Tensor]:
    call = Call.parse(text)
    rows = x.reshape(-1, call.k)
    low_rank = None
    if call.save_low_rank:
        low_rank = x.new_empty(rows.shape[0], call.rank, dtype=call.lora_dtype)
    group = bound(call, rows, tensors, seed, low_rank)
    timing = selector_named(call.records).timing(problem, choice, rows.shape[0])
    with torch.autocast(x.device.type, enabled=False), timing:
        results = choice.variant.forward_group(group, choice.config)
    outputs = [_shaped(y, (*x.shape[:-1], y.shape[1])) for y in results]
    return outputs if low_rank is None else [*outputs, low_rank]


def _backward(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    """Return the gradients that the Call needs: of x, then each Linear's of bias, lora_a and
    lora_b. grads: those of every y. tensors: the forward's, then S if the Call saves it."""
    problem, choice = _chosen(text, "backward", x)
    compute = functools.partial(_backward_by, problem, choice)
    return repeated("qlora_linear_backward", choice, compute, grads, x, tensors, seed, text)


def _backward_by(
    problem: Problem,
    choice: Choice,
    grads: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    text: str,
) -> list[Tensor]:
    call = Call.parse(text)
    rows = x.reshape(-1, call.k)
    low_rank = tensors[-1] if call.save_low_rank else None
    group = bound(call, rows, tensors, seed, low_rank)
    grad_rows = [grad.reshape(-1, each.n) for grad, each in zip(grads, call.linears, strict=True)]
    # Fewer gradients than measured take less time, which would contradict a right record.
    whole = call.needs.x and (call.needs.adapter or not call.rank)
    measured = rows.shape[0] if whole else None
    timing = selector_named(call.records).timing(problem, choice, measured)
    with torch.autocast(x.device.type, enabled=False), timing:
        grad_x, others = choice.variant.backward_group(grad_rows, group, call.needs, choice.config)
    found = [None if grad_x is None else _shaped(grad_x, x.shape)]
    for each in others:
        found += [each.bias, each.lora_a, each.lora_b]
    return [grad for grad in found if grad is not None]


def _chosen(text: str, direction: Direction, x: Tensor) -> tuple[Problem, Choice]:
    """Return the Problem of the Call `text`, and what runs for it."""
    call = Call.parse(text)
    problem = problem_of(call, direction, x.numel() // call.k, x)
    return problem, select(problem, call.records)


def _shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `rows` in another shape, but not as a view: autograd forbids writing to a view that an
    op made, and models may write to a Linear's output (`hidden += residual`)."""
    return torch.ops.aten._unsafe_view(rows, shape)


@functools.lru_cache(maxsize=4096)
def _needing(call: Call, needs: NeedsGradient) -> Call:
    return replace(call, needs=needs)


@functools.lru_cache(maxsize=4096)
def differentiated(call: Call) -> tuple[int, ...]:
    """Return the indices of the tensors whose gradients a backward returns, in that order."""
    found = []
    for each in tensor_indices(call):
        found += [each.bias] * call.needs.bias
        found += [each.lora_a, each.lora_b] * call.needs.adapter
    return tuple(index for index in found if index is not None)


def register_fused(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """Register `forward` as the op `name`, and `backward` as the op `name`_backward of its
    gradients; return the former as it appears in a graph.

    forward (x, tensors, seed, text) -> every y, and S if the Call `text` saves it; backward
    (grads, x, tensors, seed, text) -> the needed gradients, in the order of `differentiated` and
    that of x first.
    """
    op = register(name, forward, _fake_forward, _Fused)
    _BACKWARD[op] = register(f"{name}_backward", backward, _fake_backward)
    return op


_BACKWARD: dict[Any, Any] = {}
"""The ops of gradients, by the fused op."""


def _fake_forward(
    x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    call = Call.parse(text)
    outputs = [x.new_empty((*x.shape[:-1], n), dtype=call.out_dtype) for n in call.columns]
    if call.save_low_rank:
        rows = x.numel() // call.k if call.k else 0
        outputs.append(x.new_empty((rows, call.rank), dtype=call.lora_dtype))
    return outputs


def _fake_backward(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    call = Call.parse(text)
    results = [x.new_empty(x.shape)] if call.needs.x else []
    return results + [tensors[i].new_empty(tensors[i].shape) for i in differentiated(call)]


class _Fused(OpFunction):
    """Saves x, references to the packed weights, the small adapters and perhaps S [M, ranks], but
    no other tensor of [M, K], [M, N] or [N, K]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        op, _, text, x, seed, *tensors = inputs
        ctx.backward_op = _BACKWARD[op]
        ctx.call = Call.parse(text)
        ctx.x_dtype = x.dtype
        saved = list(tensors)
        if ctx.call.save_low_rank:
            ctx.mark_non_differentiable(output[-1])
            saved.append(output[-1])
        ctx.set_materialize_grads(False)
        # Only the adapters need x; without adapters the model may write to x afterwards.
        ctx.save_for_backward(x if ctx.call.rank else None, seed, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, seed, *tensors = ctx.saved_tensors
        _, _, _, needs_x, _, *needs = ctx.needs_input_grad
        columns, indices = ctx.call.columns, tensor_indices(ctx.call)
        adapters = [i for each in indices for i in (each.lora_a, each.lora_b) if i is not None]
        biases = [each.bias for each in indices if each.bias is not None]
        # The bias of experts is frozen.
        needs_bias = not ctx.call.experts and any(needs[i] for i in biases)
        call = _needing(
            ctx.call, NeedsGradient(needs_x, any(needs[i] for i in adapters), needs_bias)
        )
        results: list[Tensor | None] = [None] * len(needs)
        given = next((grad for grad in grads[: len(columns)] if grad is not None), None)
        if given is None or call.needs == NeedsGradient():
            return None, None, None, None, None, *results
        if x is None:
            x = given.new_empty(1, dtype=ctx.x_dtype).expand(*given.shape[:-1], call.k)
        dense = [
            x.new_zeros((*x.shape[:-1], n), dtype=call.out_dtype) if grad is None else grad
            for grad, n in zip(grads, columns, strict=False)
        ]
        found = iter(ctx.backward_op(dense, x, tensors, seed, str(call)))
        grad_x = next(found) if needs_x else None
        unused = [each for each, grad in zip(indices, grads, strict=False) if grad is None]
        dropped = {i for each in unused for i in (each.bias, each.lora_a, each.lora_b)}
        for i, grad in zip(differentiated(call), found, strict=True):
            results[i] = None if i in dropped else grad
        return None, None, None, grad_x, None, *results


QLORA_LINEAR: Any = register_fused("qlora_linear", _forward, _backward)
"""The op as it appears in a graph."""

QLORA_LINEAR_BACKWARD: Any = _BACKWARD[QLORA_LINEAR]


def quantized_linear(
    x: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    layout: str,
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return y [..., N] = x [..., K] @ dequant(planes)ᵀ + bias for a weight [N, K] whose Layout has
    the text `layout`.

    Without dtypes, it runs and returns in x's dtype, or in autocast's if that is on, like
    `torch.nn.functional.linear`.
    """
    device = x.device.type
    # Autocast leaves float64 alone.
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    own = torch.get_autocast_dtype(device) if casts else x.dtype
    compute_dtype = compute_dtype or own
    text = text_of_one(layout, bias is not None, 0, compute_dtype, out_dtype or own)
    tensors = [*planes] if bias is None else [*planes, bias]
    return QLORA_LINEAR(x, tensors, None, text)[0]


# Dynamo traces neither caches nor JSON; the text depends on nothing but constants.
@torch.compiler.assume_constant_result
def text_of_one(*constants: Any) -> str:
    """Return the text of the Call with `constants`, from a cache."""
    return _cached_text(*constants)


@functools.lru_cache(maxsize=4096)
def _cached_text(
    layout: str,
    bias: bool,
    rank: int,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
    experts: int = 0,
) -> str:
    linear = LinearCall(Layout.parse(layout), bias, rank)
    return str(Call((linear,), compute_dtype, compute_dtype, out_dtype, experts=experts))
