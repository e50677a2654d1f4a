"""`qlora_compile::qlora_linear`: the Linears of a Call, which share their input, as one op."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.call import Call, LinearCall, NeedsGradient
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.library import OpFunction, register
from qlora_compile.kernels.linear_call import bound, places, problem_of, tensor_count
from qlora_compile.kernels.selector import select


def hinted_rows(x: Tensor, k: int) -> int:
    """Rows of x [..., k]; a dynamic dimension stands for many, what it was at capture is one."""
    rows: Any = x.numel() // k if k else 0
    return rows if isinstance(rows, int) else rows.node.hint or 0


def _forward(x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str) -> list[Tensor]:
    """Every y [..., N] of the Call, and last, if the Call saves it, S [M, sum of ranks].

    x [..., K]; tensors as `places` tells; seed: int64 [1] where the adapters' input is dropped out.
    """
    call = Call.parse(text)
    rows = x.reshape(-1, call.k)
    low_rank = None
    if call.save_low_rank:
        low_rank = x.new_empty(rows.shape[0], call.rank, dtype=call.lora_dtype)
    group = bound(call, rows, tensors, seed, low_rank)
    with torch.autocast(x.device.type, enabled=False):
        choice = select(problem_of(call, "forward", rows.shape[0], x), call.records)
        results = choice.variant.forward_group(group, choice.config)
    outputs = [_shaped(y, (*x.shape[:-1], y.shape[1])) for y in results]
    return outputs if low_rank is None else [*outputs, low_rank]


def _fake_forward(
    x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    call = Call.parse(text)
    outputs = [x.new_empty((*x.shape[:-1], each.n), dtype=call.out_dtype) for each in call.linears]
    if call.save_low_rank:
        rows = x.numel() // call.k if call.k else 0
        outputs.append(x.new_empty((rows, call.rank), dtype=call.lora_dtype))
    return outputs


def _backward(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    """The gradients that the Call needs: of x, then of each Linear those of its bias, lora_a and
    lora_b. grads: of every y. tensors: the forward's, then S if the Call saves it."""
    call = Call.parse(text)
    rows = x.reshape(-1, call.k)
    low_rank = tensors[-1] if call.save_low_rank else None
    group = bound(call, rows, tensors, seed, low_rank)
    grad_rows = [grad.reshape(-1, each.n) for grad, each in zip(grads, call.linears, strict=True)]
    with torch.autocast(x.device.type, enabled=False):
        choice = select(problem_of(call, "backward", rows.shape[0], x), call.records)
        grad_x, others = choice.variant.backward_group(grad_rows, group, call.needs, choice.config)
    found = [None if grad_x is None else _shaped(grad_x, x.shape)]
    for each in others:
        found += [each.bias, each.lora_a, each.lora_b]
    return [grad for grad in found if grad is not None]


def _fake_backward(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], seed: Tensor | None, text: str
) -> list[Tensor]:
    call = Call.parse(text)
    results = [x.new_empty(x.shape)] if call.needs.x else []
    return results + [tensors[i].new_empty(tensors[i].shape) for i in differentiated(call)]


def _shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """`rows` in another shape, and no view of them: autograd lets nobody write to a view that an
    op made, as a model may to a Linear's output (`hidden += residual`)."""
    return torch.ops.aten._unsafe_view(rows, shape)


@functools.lru_cache(maxsize=4096)
def _needing(call: Call, needs: NeedsGradient) -> Call:
    return replace(call, needs=needs)


@functools.lru_cache(maxsize=4096)
def differentiated(call: Call) -> tuple[int, ...]:
    """The places of the tensors whose gradients a backward returns, in that order."""
    found = []
    for place in places(call):
        found += [place.bias] * call.needs.bias
        found += [place.lora_a, place.lora_b] * call.needs.adapter
    return tuple(place for place in found if place is not None)


class _Linears(OpFunction):
    """Saves x, handles to the packed weights, the small adapters and perhaps S [M, ranks]: nothing
    else of [M, K], [M, N] or [N, K]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, text, x, seed, *tensors = inputs
        ctx.call = Call.parse(text)
        ctx.x_dtype = x.dtype
        saved = list(tensors)
        if ctx.call.save_low_rank:
            ctx.mark_non_differentiable(output[-1])
            saved.append(output[-1])
        ctx.set_materialize_grads(False)
        # x is for the adapters alone: without any the model may write to it afterwards.
        ctx.save_for_backward(x if ctx.call.rank else None, seed, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, seed, *tensors = ctx.saved_tensors
        _, _, _, needs_x, _, *needs = ctx.needs_input_grad
        linears, spots = ctx.call.linears, places(ctx.call)
        adapters = [i for each in spots for i in (each.lora_a, each.lora_b) if i is not None]
        biases = [each.bias for each in spots if each.bias is not None]
        call = _needing(
            ctx.call,
            NeedsGradient(needs_x, any(needs[i] for i in adapters), any(needs[i] for i in biases)),
        )
        results: list[Tensor | None] = [None] * tensor_count(call)
        given = next((grad for grad in grads[: len(linears)] if grad is not None), None)
        if given is None or call.needs == NeedsGradient():
            return None, None, None, None, None, *results
        if x is None:
            x = given.new_empty(1, dtype=ctx.x_dtype).expand(*given.shape[:-1], call.k)
        dense = [
            x.new_zeros((*x.shape[:-1], each.n), dtype=call.out_dtype) if grad is None else grad
            for grad, each in zip(grads, linears, strict=False)
        ]
        found = iter(QLORA_LINEAR_BACKWARD(dense, x, tensors, seed, str(call)))
        grad_x = next(found) if needs_x else None
        unused = [each for each, grad in zip(spots, grads, strict=False) if grad is None]
        dropped = {i for each in unused for i in (each.bias, each.lora_a, each.lora_b)}
        for i, grad in zip(differentiated(call), found, strict=True):
            results[i] = None if i in dropped else grad
        return None, None, None, grad_x, None, *results


QLORA_LINEAR = register("qlora_linear", _forward, _fake_forward, _Linears)
QLORA_LINEAR_BACKWARD = register("qlora_linear_backward", _backward, _fake_backward)


def quantized_linear(
    x: Tensor,
    planes: Sequence[Tensor],
    bias: Tensor | None,
    layout: str,
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] @ dequant(planes)ᵀ + bias for a weight [N, K] stored as the
    Layout that `layout` is the text of.

    Without dtypes it runs and returns in x's dtype, or in autocast's where that is on, as
    `torch.nn.functional.linear` would.
    """
    device = x.device.type
    # Autocast leaves float64 alone.
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    own = torch.get_autocast_dtype(device) if casts else x.dtype
    compute_dtype = compute_dtype or own
    text = _text_of_one(layout, bias is not None, compute_dtype, out_dtype or own)
    tensors = [*planes] if bias is None else [*planes, bias]
    return QLORA_LINEAR(x, tensors, None, text)[0]


# Dynamo traces neither caches nor JSON; the text depends on nothing but constants.
@torch.compiler.assume_constant_result
def _text_of_one(*constants: Any) -> str:
    return _cached_text(*constants)


@functools.lru_cache(maxsize=4096)
def _cached_text(
    layout: str, bias: bool, compute_dtype: torch.dtype, out_dtype: torch.dtype
) -> str:
    linear = LinearCall(Layout.parse(layout), bias)
    return str(Call((linear,), compute_dtype, compute_dtype, out_dtype))
