"""Models the seconds of the native variants on a CPU by the operators they call."""

from __future__ import annotations

import math

import torch

from qlora_compile.kernels.device_model import CpuModel
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import ROW_BLOCK

_DECODE_OPERATORS = 5
"""How many operators decode a block: widen, look up, scale, round, double quantisation."""

AUGMENTED_BLOCK = 1 << 17
"""Weights that `augmented_native` decodes at a time, in cache, before they are put into its
workspace's longer rows."""


def dense_seconds(
    problem: Problem, cpu: CpuModel, dtype: torch.dtype, weight_block: int | None, merged: bool
) -> float:
    """Return modelled seconds of `dense`, which decodes `weight_block` weights at a time and
    multiplies in `dtype`."""
    m, n, k, rank = problem.m, problem.n, problem.k, problem.rank
    blocks = 1 if weight_block is None else math.ceil(n * k / weight_block)
    backward = problem.direction == "backward"
    # Where operands are converted, blocks of W are decoded for each block of rows.
    converts = {problem.x_dtype, problem.out_dtype} != {dtype}
    passes = math.ceil(m / ROW_BLOCK) if converts and blocks > 1 else 1
    seconds = passes * _decode_seconds(problem, cpu, dtype, blocks)
    seconds += _product_seconds(problem, cpu, dtype) + passes * blocks * cpu.operator
    seconds += _cast_seconds(problem, cpu, dtype)
    if backward:
        seconds += (blocks - 1) * cpu.move_seconds(2 * m * k * dtype.itemsize)
    if not rank:
        return seconds
    if merged:
        seconds += passes * 2 * n * k * rank / cpu.of(cpu.thin, dtype)
        seconds += passes * cpu.move_seconds(2 * n * k * dtype.itemsize)
    else:
        columns = k if backward else n
        seconds += _thin_seconds(problem, cpu, dtype, columns)
        seconds += blocks * cpu.move_seconds(2 * m * columns * dtype.itemsize / blocks)
    return seconds + _adapter_seconds(problem, cpu, dtype, needs_low=not merged)


def augmented_seconds(problem: Problem, cpu: CpuModel, dtype: torch.dtype) -> float:
    """Return modelled seconds of `augmented_native`, which multiplies by W and B side by side in
    one matrix of `dtype`."""
    m, n, k, rank = problem.m, problem.n, problem.k, problem.rank
    blocks = math.ceil(n * k / AUGMENTED_BLOCK)
    seconds = _decode_seconds(problem, cpu, dtype, blocks) + blocks * cpu.operator
    seconds += _product_seconds(problem, cpu, dtype) + _cast_seconds(problem, cpu, dtype)
    # W goes through a buffer, x or dX through rows of K + rank.
    seconds += cpu.move_seconds(2 * n * k * dtype.itemsize)
    seconds += 2 * cpu.move_seconds(2 * m * (k + rank) * dtype.itemsize)
    if problem.direction == "backward":
        seconds += _thin_seconds(problem, cpu, dtype, k)
    return seconds + _adapter_seconds(problem, cpu, dtype, needs_low=True)


def _decode_seconds(problem: Problem, cpu: CpuModel, dtype: torch.dtype, blocks: int) -> float:
    if not problem.layout.quantized:
        same = dtype == problem.compute_dtype
        return 0.0 if same else cpu.move_seconds(6 * problem.n * problem.k)
    decode = problem.n * problem.k * cpu.of(cpu.decode, dtype)
    if blocks == 1:
        # Weights that have left the cache are read again for the product.
        outside = max(problem.n * problem.k * dtype.itemsize - _CACHE_BYTES, 0)
        decode += 2 * outside / cpu.bandwidth
    return decode + blocks * _DECODE_OPERATORS * cpu.operator


_CACHE_BYTES = 16 << 20
"""An assumed size of the last-level cache, which torch does not tell."""


def _product_seconds(problem: Problem, cpu: CpuModel, dtype: torch.dtype) -> float:
    operations = 2 * problem.m * problem.n * problem.k
    # The product's operands are read at least once, which is what counts for a few rows.
    moved = problem.n * problem.k * dtype.itemsize
    return max(operations / cpu.of(cpu.gemm, dtype), moved / cpu.bandwidth)


def _cast_seconds(problem: Problem, cpu: CpuModel, dtype: torch.dtype) -> float:
    m, n, k = problem.m, problem.n, problem.k
    forward = problem.direction == "forward"
    source, result = (k, n) if forward else (n, k)
    dtypes = (problem.x_dtype, problem.out_dtype)
    source_dtype, result_dtype = dtypes if forward else dtypes[::-1]
    seconds = 0.0
    for columns, other in ((source, source_dtype), (result, result_dtype)):
        if other != dtype:
            seconds += cpu.move_seconds(m * columns * (other.itemsize + dtype.itemsize))
    return seconds


def _thin_seconds(problem: Problem, cpu: CpuModel, dtype: torch.dtype, columns: int) -> float:
    """Return seconds of one product [M, columns] with [columns, rank], in the adapter's dtype."""
    wide = max((dtype, problem.lora_dtype), key=lambda each: each.itemsize)
    rate = cpu.of(cpu.thin, wide)
    return 2 * problem.m * columns * problem.rank / rate + cpu.operator


def _adapter_seconds(
    problem: Problem, cpu: CpuModel, dtype: torch.dtype, *, needs_low: bool
) -> float:
    """Return the seconds of what all variants do: S, gradients of A and B, conversions, masks."""
    m, n, k = problem.m, problem.n, problem.k
    wide = max((dtype, problem.lora_dtype), key=lambda each: each.itemsize)
    seconds = 0.0
    if problem.dropout:
        seconds += m * k * cpu.dropout
    if problem.direction == "forward":
        if needs_low or problem.keeps_low_rank:
            seconds += _thin_seconds(problem, cpu, dtype, k)
            if wide != problem.x_dtype:
                seconds += cpu.move_seconds(m * k * (wide.itemsize + problem.x_dtype.itemsize))
        return seconds
    # dY B, dYᵀ S, (dY B)ᵀ x, and S again unless it was kept.
    seconds += 2 * _thin_seconds(problem, cpu, dtype, n) + _thin_seconds(problem, cpu, dtype, k)
    if not problem.keeps_low_rank:
        seconds += _thin_seconds(problem, cpu, dtype, k)
    for columns, other in ((n, problem.out_dtype), (k, problem.x_dtype)):
        if wide != other:
            seconds += cpu.move_seconds(m * columns * (wide.itemsize + other.itemsize))
    return seconds
