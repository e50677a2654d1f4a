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

    def __str__(self) -> str:
        """Such as "forward 512x1536x576 rank 16, nf4/64 double, bfloat16, adapter float32, cpu"."""

        def short(dtype: torch.dtype) -> str:
            return str(dtype).removeprefix("torch.")

        stored = f"{self.format}/{self.block_size}" if self.block_size else self.format
        dtypes = [short(self.x_dtype), short(self.compute_dtype), short(self.out_dtype)]
        parts = [
            f"{self.direction} {self.m}x{self.n}x{self.k} rank {self.rank}",
            stored + " double" * self.double_quantized,
            dtypes[0] if len(set(dtypes)) == 1 else ">".join(dtypes),
        ]
        if self.rank:
            parts.append(f"adapter {short(self.lora_dtype)}")
        flags = {"bias": self.bias, "dropout": self.dropout, "S kept": self.keeps_low_rank}
        parts += [name for name, is_set in flags.items() if is_set]
        return ", ".join([*parts, self.device])
