"""Problem: the key of one fused linear, by which variants are chosen and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qlora_compile.kernels.formats.formats import format_of
from qlora_compile.kernels.layout import Layout, OfLayout

Direction = Literal["forward", "backward"]


def bucket_rows(rows: int) -> int:
    """Return the least power of two >= `rows`, so that near row counts share one choice."""
    return 1 << max(rows - 1, 0).bit_length()


@dataclass(frozen=True)
class Sibling:
    """The properties in which Linears that share their input may differ."""

    n: int
    rank: int
    bias: bool


@dataclass(frozen=True)
class Problem(OfLayout):
    """One direction of y[M, N] = x[M, K] @ dequant(W)[N, K]ᵀ + bias + scaling * drop(x) Aᵀ Bᵀ.

    `m` is bucketed (`bucket_rows`), everything else is exact. `layout`: how W is stored, and its
    shape. `rank`: 0 without an adapter. `keeps_low_rank`: whether the forward also returns
    scaling * drop(x) Aᵀ [M, rank], and the backward is given it.

    `siblings`: the Linears of a group that share x, in order; empty for a single Linear. In a group
    the layout's N and `rank` are sums, and `bias` says whether any Linear has one.
    """

    direction: Direction
    m: int
    layout: Layout
    rank: int
    x_dtype: torch.dtype
    compute_dtype: torch.dtype
    lora_dtype: torch.dtype
    out_dtype: torch.dtype
    bias: bool
    dropout: bool
    keeps_low_rank: bool
    device: str
    siblings: tuple[Sibling, ...] = ()

    @classmethod
    def of_group(cls, parts: Sequence[Problem]) -> Problem:
        """Return the Problem of Linears that share their input, given their own Problems `parts`,
        which differ only in what a Sibling holds, or in the adapter dtype of a Linear without
        adapter, which is then the others'."""
        if len(parts) == 1:
            return parts[0]
        adapted = next((part for part in parts if part.rank), parts[0])
        siblings = tuple(Sibling(part.n, part.rank, part.bias) for part in parts)
        return replace(
            adapted,
            layout=adapted.layout.with_rows(sum(each.n for each in siblings)),
            rank=sum(each.rank for each in siblings),
            bias=any(each.bias for each in siblings),
            siblings=siblings,
        )

    @property
    def parts(self) -> tuple[Problem, ...]:
        """Each sibling's own Problem; for a single Linear, this Problem."""
        if not self.siblings:
            return (self,)
        return tuple(
            replace(
                self,
                layout=self.layout.with_rows(each.n),
                rank=each.rank,
                bias=each.bias,
                dropout=self.dropout and each.rank > 0,
                keeps_low_rank=self.keeps_low_rank and each.rank > 0,
                siblings=(),
            )
            for each in self.siblings
        )

    @property
    def columns(self) -> str:
        """N for people: "576+192+192" for siblings."""
        return "+".join(str(part.n) for part in self.parts)

    @property
    def ranks(self) -> str:
        """The ranks, written like `columns`; one number if all are equal."""
        ranks = dict.fromkeys(part.rank for part in self.parts)
        listed = ranks if len(ranks) == 1 else (part.rank for part in self.parts)
        return "+".join(map(str, listed))

    def __str__(self) -> str:
        """Return text such as "forward 512x1536x576 rank 16, nf4/64 double, bfloat16, adapter
        float32, cpu"."""

        def short(dtype: torch.dtype) -> str:
            return str(dtype).removeprefix("torch.")

        quant_format = format_of(self.layout)
        stored = self.layout.format if quant_format is None else quant_format.label(self.layout)
        dtypes = [short(self.x_dtype), short(self.compute_dtype), short(self.out_dtype)]
        parts = [
            f"{self.direction} {self.m}x{self.columns}x{self.k} rank {self.ranks}",
            stored,
            dtypes[0] if len(set(dtypes)) == 1 else ">".join(dtypes),
        ]
        if self.rank:
            parts.append(f"adapter {short(self.lora_dtype)}")
        flags = {"bias": self.bias, "dropout": self.dropout, "S kept": self.keeps_low_rank}
        parts += [name for name, is_set in flags.items() if is_set]
        return ", ".join([*parts, self.device])
