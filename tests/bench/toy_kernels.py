"""Kernels small enough to predict what their binaries hold, as shipped launches.

Import only where TRITON_INTERPRET is unset: see compiled.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.launch import Launch

SIZE = 4096
BM, BC, BR = 128, 128, 32


@triton.jit
def product(
    x, w, low, up, y, M, N, K,
    RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] Wᵀ + low upᵀ, whole tiles only."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    acc = tl.zeros((BM, BC), tl.float32)
    if RANK:
        ranks = tl.arange(0, RANK)
        left = tl.load(low + rows[:, None] * RANK + ranks[None, :])
        right = tl.load(up + columns[:, None] * RANK + ranks[None, :])
        acc = tl.dot(left, right.T, acc)
    xs = x + rows[:, None] * K + tl.arange(0, BR)[None, :]
    ws = w + columns[:, None] * K + tl.arange(0, BR)[None, :]
    for _ in range(0, K, BR):
        acc = tl.dot(tl.load(xs), tl.load(ws).T, acc)
        xs += BR
        ws += BR
    tl.store(y + rows[:, None] * N + columns[None, :], acc.to(tl.bfloat16))


@triton.jit
def widen(codes, out, SIZE: tl.constexpr):
    """out: float16 of int8 codes; every element once."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(codes + at).to(tl.float16))


@triton.jit
def widen_badly(codes, out, SIZE: tl.constexpr):
    """The same in reverse order, which no wide access can do."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out - at, tl.load(codes - at).to(tl.float16))


@triton.jit
def crowded(x, y, COUNT: tl.constexpr):
    """Holds COUNT values per lane at the same time: spills where registers are few."""
    lanes = tl.arange(0, 32 * COUNT)
    values = tl.load(x + lanes).to(tl.float32)
    total = tl.sum(values)
    tl.debug_barrier()
    tl.store(y + lanes, tl.exp(values * total))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def product_launch(rank: int = 16, **options: Any) -> Launch:
    arguments = {
        "x": meta(SIZE, SIZE),
        "w": meta(SIZE, SIZE),
        "low": meta(SIZE, max(rank, 1)),
        "up": meta(SIZE, max(rank, 1)),
        "y": meta(SIZE, SIZE),
        "M": SIZE,
        "N": SIZE,
        "K": SIZE,
    }
    constexprs = {"RANK": rank, "BM": BM, "BC": BC, "BR": BR}
    grid = (SIZE // BM, SIZE // BC)
    return Launch(product, grid, arguments, constexprs, num_warps=4, num_stages=4, options=options)


def widen_launch(kernel: Any = widen, block: int = 2048) -> Launch:
    arguments = {
        "codes": meta(SIZE * SIZE, dtype=torch.int8),
        "out": meta(SIZE * SIZE, dtype=torch.float16),
    }
    return Launch(kernel, (SIZE * SIZE // block,), arguments, {"SIZE": block}, num_warps=4)


def crowded_launch() -> Launch:
    values = meta(32 * 256, dtype=torch.float32)
    return Launch(crowded, (1,), {"x": values, "y": values}, {"COUNT": 256}, 1, 1, {"maxnreg": 64})
