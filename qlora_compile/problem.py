"""Problem: the key of one fused linear, by which implementations are chosen and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "backward"]


def bucket_rows(rows: int) -> int:
    """The smallest power of two >= `rows`, so that near row counts share one choice."""
    return 1 << max(rows - 1, 0).bit_length()


@dataclass(frozen=True)
class Problem:
    """One direction of y[M, N] = x[M, K] @ dequant(W)[N, K]ᵀ + bias + scaling * drop(x) Aᵀ Bᵀ.

    `m` is bucketed (`bucket_rows`), everything else is exact; `rank` is 0 without an adapter;
    `format` is "none" for a weight kept in its own floating-point dtype. `keeps_low_rank`: the
    forward returns scaling * drop(x) Aᵀ [M, rank] too, and the backward is given it.
    """

    direction: Direction
    m: int
    n: int
    k: int
    rank: int
    format: str
    block_size: int
    double_quantized: bool
    x_dtype: torch.dtype
    compute_dtype: torch.dtype
    lora_dtype: torch.dtype
    out_dtype: torch.dtype
    bias: bool
    dropout: bool
    keeps_low_rank: bool
    device: str
