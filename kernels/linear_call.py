"""A Call of Linears bound to its tensors, and the Problem it poses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.call import Call
from qlora_compile.kernels.formats.formats import plane_count, plane_dtypes
from qlora_compile.kernels.packed import of_bytes
from qlora_compile.kernels.problem import Direction, Problem, bucket_rows
from qlora_compile.kernels.variants.base import Group, Linear, LinearSpec, LinearTensors


@dataclass(frozen=True)
class TensorIndices:
    """The indices of one Linear's tensors among the tensors of its Call; None for what it lacks."""

    planes: slice
    bias: int | None
    lora_a: int | None
    lora_b: int | None
    scaling: int | None

    def named(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """Return the tensors of this Linear, out of `tensors`, by name."""
        return {name: None if at is None else tensors[at] for name, at in vars(self).items()}


@functools.lru_cache(maxsize=4096)
def tensor_indices(call: Call) -> tuple[TensorIndices, ...]:
    """Return for each Linear the indices of its planes, of its bias if it has one, and, if it has
    an adapter, of lora_a [R, K], lora_b [N, R] and scaling (float32, one element), in this order.

    Experts have their offsets before the planes. A backward that gets S [M, sum of ranks] has it
    after the tensors of the last Linear.
    """
    found = []
    end = 1 if call.experts else 0
    for linear in call.linears:
        planes = slice(end, end + plane_count(linear.layout))
        end = planes.stop
        bias = lora_a = lora_b = scaling = None
        if linear.bias:
            bias, end = end, end + 1
        if linear.rank:
            lora_a, lora_b, scaling, end = end, end + 1, end + 2, end + 3
        found.append(TensorIndices(planes, bias, lora_a, lora_b, scaling))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def scaling_indices(text: str) -> tuple[int, ...]:
    """Return the indices of the scalings among the tensors of the Call `text`."""
    found = (each.scaling for each in tensor_indices(Call.parse(text)))
    return tuple(index for index in found if index is not None)


@functools.lru_cache(maxsize=4096)
def specs(call: Call) -> tuple[LinearSpec, ...]:
    """Return the constants of each Linear of `call`, as variants take them."""
    dtypes = (call.compute_dtype, call.lora_dtype, call.out_dtype)
    return tuple(
        LinearSpec(linear.layout, call.dropout, linear.stream, *dtypes) for linear in call.linears
    )


def bound(
    call: Call,
    x: Tensor,
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    low_rank: Tensor | None = None,
) -> Group:
    """Return the Linears of `call` with their `tensors`, which are in the order of
    `tensor_indices`. low_rank: S of all adapters in one tensor [M, sum of ranks]; each adapter gets
    its columns."""
    group: list[Linear] = []
    column = 0
    for linear, indices, spec in zip(call.linears, tensor_indices(call), specs(call), strict=True):
        own = None
        if linear.rank and low_rank is not None:
            own = low_rank[:, column : column + linear.rank]
            column += linear.rank
        own_seed = seed if linear.rank and call.dropout else None
        named = indices.named(tensors)
        if dtypes := plane_dtypes(linear.layout):
            planes = zip(named["planes"], dtypes, strict=True)
            named["planes"] = [of_bytes(*each) for each in planes]
        group.append((LinearTensors(x=x, **named, seed=own_seed, low_rank=own), spec))
    return group


def problem_of(call: Call, direction: Direction, rows: int, x: Tensor) -> Problem:
    """Return the Problem of `call` in one direction, for `rows` rows of x's dtype on x's device."""
    return _problem(call, direction, bucket_rows(rows), x.dtype, str(x.device))


@functools.lru_cache(maxsize=4096)
def _problem(
    call: Call, direction: Direction, m: int, x_dtype: torch.dtype, device: str
) -> Problem:
    return Problem.of_group(
        [
            Problem(
                direction=direction,
                m=m,
                layout=linear.layout,
                rank=linear.rank,
                x_dtype=x_dtype,
                compute_dtype=call.compute_dtype,
                lora_dtype=call.lora_dtype,
                out_dtype=call.out_dtype,
                bias=linear.bias,
                dropout=call.dropout > 0 and linear.rank > 0,
                keeps_low_rank=call.save_low_rank and linear.rank > 0,
                device=device,
            )
            for linear in call.linears
        ]
    )
