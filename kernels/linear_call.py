"""The fused linears of one call as ops of autograd: forward and backward, each by a variant that is
picked for its Problem when it runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.problem import Direction, Problem, bucket_rows
from qlora_compile.kernels.registry import UNQUANTIZED, format_named
from qlora_compile.kernels.selection import select
from qlora_compile.kernels.variants.base import (
    Group,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
)


def linear_spec(format: str, *constants: Any) -> LinearSpec:
    """The spec of a call, from `qlora_linear`'s arguments behind its tensors."""
    return LinearSpec(None if format == UNQUANTIZED else format_named(format), *constants)


def linear_problem(
    direction: Direction, rows: int, tensors: LinearTensors, spec: LinearSpec
) -> Problem:
    """The key of one Linear with so many rows, whatever shape `tensors.x` has."""
    return Problem(
        direction=direction,
        m=bucket_rows(rows),
        n=spec.n,
        k=spec.k,
        rank=0 if tensors.lora_a is None else tensors.lora_a.shape[0],
        format=UNQUANTIZED if spec.format is None else spec.format.name,
        block_size=spec.block_size,
        double_quantized=len(tensors.planes) > 2,
        x_dtype=tensors.x.dtype,
        compute_dtype=spec.compute_dtype,
        lora_dtype=spec.lora_dtype,
        out_dtype=spec.out_dtype,
        bias=tensors.bias is not None,
        dropout=tensors.seed is not None and tensors.lora_a is not None,
        keeps_low_rank=tensors.low_rank is not None,
        device=str(tensors.x.device),
    )


def group_problem(direction: Direction, rows: int, group: Group) -> Problem:
    """The key of a call with so many rows."""
    return Problem.of_group([linear_problem(direction, rows, *linear) for linear in group])


def linears_of_call(
    x: Tensor,
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    layout: tuple[Sequence[bool], Sequence[bool]],
    constants: Sequence[Any],
    low_rank: Tensor | None = None,
) -> Group:
    """The Linears of a call. tensors: of each Linear its planes, its bias if it has one and its
    lora_a and lora_b if it has them, as `layout` tells. low_rank: S of all in one [M, sum of
    ranks], of which each adapter has its columns."""
    format, n, k, block_size, scaling, dropout, stream, *dtypes = constants
    optional = sum(map(sum, layout)) + sum(layout[1])
    count = (len(tensors) - optional) // len(n)
    rest = iter(tensors)
    group = []
    rank = 0
    for has_bias, has_adapter, *own in zip(*layout, n, scaling, stream, strict=True):
        planes = list(itertools.islice(rest, count))
        bias = next(rest) if has_bias else None
        lora_a = lora_b = mask = low = None
        if has_adapter:
            lora_a, lora_b, mask = next(rest), next(rest), seed
            if low_rank is not None:
                low, rank = low_rank[:, rank : rank + len(lora_a)], rank + len(lora_a)
        spec = linear_spec(format, own[0], k, block_size, own[1], dropout, own[2], *dtypes)
        group.append((LinearTensors(x, planes, bias, lora_a, lora_b, mask, low), spec))
    return group


# No defaults in the schemas: autograd of custom ops drops defaulted arguments and then miscounts
# the tensors of a list.
@torch.library.custom_op("qlora_compile::qlora_linear_forward", mutates_args=())
def qlora_linear_forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    has_bias: Sequence[bool],
    has_adapter: Sequence[bool],
    keeps: bool,
    source: str,
    format: str,
    n: Sequence[int],
    k: int,
    block_size: int,
    scaling: Sequence[float],
    dropout: float,
    stream: Sequence[int],
    compute_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """Every y of `qlora_linear_group` and last, if it `keeps`, S = scaling / (1 - dropout) *
    drop(x) lora_aᵀ of all in one [M, sum of ranks] in `lora_dtype`, else an empty tensor.

    tensors: as in `linears_of_call`. source: of records, as in `selection`.
    """
    constants = (
        *(format, n, k, block_size, scaling, dropout, stream),
        *(compute_dtype, lora_dtype, out_dtype),
    )
    x_rows, layout = x.reshape(-1, k), (has_bias, has_adapter)
    group = linears_of_call(x_rows, tensors, seed, layout, constants)
    low_rank = x.new_empty(0)
    if keeps:
        low_rank = x.new_empty(x_rows.shape[0], _total_rank(group), dtype=lora_dtype)
        group = linears_of_call(x_rows, tensors, seed, layout, constants, low_rank)
    with torch.autocast(x.device.type, enabled=False):
        choice = select(group_problem("forward", x_rows.shape[0], group), source)
        results = choice.variant.forward_group(group, choice.config)
    return [*(_shaped(y, (*x.shape[:-1], y.shape[1])) for y in results), low_rank]


def _total_rank(group: Group) -> int:
    return sum(len(tensors.lora_a) for tensors, _ in group if tensors.lora_a is not None)


def _shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """`rows` in another shape, and no view of them: autograd lets nobody write to a view that an
    op made, as a model may to a Linear's output (`hidden += residual`)."""
    return torch.ops.aten._unsafe_view(rows, shape)


@qlora_linear_forward.register_fake
def _(x, tensors, seed, has_bias, has_adapter, keeps, source, format, n, k, *constants):
    results = [x.new_empty((*x.shape[:-1], each), dtype=constants[-1]) for each in n]
    if not keeps:
        return [*results, x.new_empty(0)]
    layout = (has_bias, has_adapter)
    group = linears_of_call(x, tensors, seed, layout, (format, n, k, *constants))
    rows = x.numel() // k if k else 0
    return [*results, x.new_empty((rows, _total_rank(group)), dtype=constants[-2])]


@torch.library.custom_op("qlora_compile::qlora_linear_backward", mutates_args=())
def qlora_linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    low_rank: Tensor | None,
    needs_x: bool,
    needs_adapter: bool,
    needs_bias: bool,
    has_bias: Sequence[bool],
    has_adapter: Sequence[bool],
    source: str,
    format: str,
    n: Sequence[int],
    k: int,
    block_size: int,
    scaling: Sequence[float],
    dropout: float,
    stream: Sequence[int],
    compute_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """The needed ones of: grad x, then of each Linear [grad bias, grad lora_a, grad lora_b]."""
    constants = (
        *(format, n, k, block_size, scaling, dropout, stream),
        *(compute_dtype, lora_dtype, out_dtype),
    )
    x_rows = x.reshape(-1, k)
    group = linears_of_call(x_rows, tensors, seed, (has_bias, has_adapter), constants, low_rank)
    needs = NeedsGradient(needs_x, needs_adapter, needs_bias)
    rows = [grad.reshape(-1, each) for grad, each in zip(grads, n, strict=True)]
    with torch.autocast(x.device.type, enabled=False):
        choice = select(group_problem("backward", x_rows.shape[0], group), source)
        grad_x, others = choice.variant.backward_group(rows, group, needs, choice.config)
    found = [None if grad_x is None else _shaped(grad_x, x.shape)]
    for each in others:
        found += [each.bias, each.lora_a, each.lora_b]
    return [grad for grad in found if grad is not None]


@qlora_linear_backward.register_fake
def _(grads, x, tensors, seed, low_rank, needs_x, needs_adapter, needs_bias, *rest):
    has_bias, has_adapter, _, *constants = rest
    results = [x.new_empty(x.shape)] if needs_x else []
    for linear, _ in linears_of_call(x, tensors, seed, (has_bias, has_adapter), constants):
        wanted = [linear.bias] if needs_bias else []
        wanted += [linear.lora_a, linear.lora_b] if needs_adapter else []
        results += [each.new_empty(each.shape) for each in wanted if each is not None]
    return results


def _setup_context(ctx, inputs, output) -> None:
    x, tensors, seed, has_bias, has_adapter, keeps, *ctx.constants = inputs
    # x, handles to the packed weights, the small adapters and perhaps S [M, rank]: nothing else of
    # [M, K], [M, N] or [N, K] is kept. x is for the adapters alone: without any the model may
    # write to it afterwards.
    ctx.layout = has_bias, has_adapter
    low_rank = output[-1] if keeps else None
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(x if any(has_adapter) else None, seed, low_rank, *tensors)


def _backward(ctx, grads):
    x, seed, low_rank, *tensors = ctx.saved_tensors
    n = ctx.constants[2]
    needs_x, needs_tensors = ctx.needs_input_grad[:2]
    has_bias, has_adapter = ctx.layout
    count = (len(tensors) - sum(has_bias) - 2 * sum(has_adapter)) // len(n)
    # Of each Linear the positions of its bias and of its factors among the tensors.
    biases, factors, unused = [], [], set()
    end = 0
    for grad, with_bias, with_adapter in zip(grads, has_bias, has_adapter, strict=False):
        first = end + count
        end = first + with_bias + 2 * with_adapter
        biases += [first] * with_bias
        factors += range(first + with_bias, end)
        unused |= set(range(first, end)) if grad is None else set()
    needs_bias = any(needs_tensors[i] for i in biases)
    needs_adapter = any(needs_tensors[i] for i in factors)
    nothing = (None,) * (len(ctx.needs_input_grad) - 2)
    results: list[Tensor | None] = [None] * len(tensors)
    given = next((grad for grad in grads[:-1] if grad is not None), None)
    if given is None or not (needs_x or needs_adapter or needs_bias):
        return (None, results, *nothing)
    if x is None:
        x = given.new_empty(1, dtype=ctx.x_dtype).expand(*given.shape[:-1], ctx.constants[3])
    dense = [
        x.new_zeros((*x.shape[:-1], each), dtype=ctx.constants[-1]) if grad is None else grad
        for grad, each in zip(grads, n, strict=False)
    ]
    needs = (needs_x, needs_adapter, needs_bias)
    found = iter(
        qlora_linear_backward(
            dense, x, tensors, seed, low_rank, *needs, has_bias, has_adapter, *ctx.constants
        )
    )
    grad_x = next(found) if needs_x else None
    for i in sorted([*biases * needs_bias, *factors * needs_adapter]):
        grad = next(found)
        results[i] = None if i in unused else grad
    return (grad_x, results, *nothing)


qlora_linear_forward.register_autograd(_backward, setup_context=_setup_context)
