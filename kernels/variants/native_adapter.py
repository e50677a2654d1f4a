"""The adapter's thin products and gradients: in torch's own operators, over blocks of rows, or in
one pass on a CPU with the instructions for it."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.cpu import dropout, thin
from qlora_compile.kernels.cpu.instructions import multiplies, product_dtype
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.layout import slices
from qlora_compile.kernels.variants.adapter_sum import accumulate, add_product
from qlora_compile.kernels.variants.base import (
    ROW_BLOCK,
    Group,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    adapter_scaling,
)

DEVICE_ROW_BLOCKS = 8
"""How many CPU blocks of rows make one on another device, where a block costs a dozen launches."""


def native_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    """Return the dtypes in which a CPU can multiply operands of `dtype` without losing accuracy,
    the preferred one first. A dtype that the CPU has no instructions for is left out: to measure it
    once takes seconds."""
    narrow = dtype in (torch.bfloat16, torch.float16) and multiplies(dtype)
    return [dtype, torch.float32] if narrow else [product_dtype(dtype)]


def row_blocks(x: Tensor, whole: bool) -> list[slice]:
    """Return the rows of x [M, …] in blocks, or all at once if `whole`."""
    block = ROW_BLOCK if x.device.type == "cpu" else ROW_BLOCK * DEVICE_ROW_BLOCKS
    return slices(x.shape[0], x.shape[0] if whole else block)


def cut(tensor: Tensor, *parts: slice) -> Tensor:
    """Return tensor[parts], or `tensor` itself if the parts take all of it, because making a view
    takes as long as a small product."""
    whole = all(
        part.start == 0 and part.stop == size
        for part, size in zip(parts, tensor.shape, strict=False)
    )
    return tensor if whole else tensor[parts]


@dataclass(frozen=True)
class NativeAdapter:
    """The adapter of one Linear of a group, its factors in the dtype that its products run in.

    scaling: alpha / rank times dropout's factor 1 / (1 - p). columns: this adapter's columns of the
    group's S.
    """

    tensors: LinearTensors
    spec: LinearSpec
    a: Tensor
    b: Tensor
    scaling: float | Tensor
    columns: slice

    def mask(self, rows: slice) -> Tensor | None:
        """Return the dropout mask of `rows` of x, in the factors' dtype; None without dropout."""
        seed, spec = self.tensors.seed, self.spec
        if seed is None:
            return None
        if dropout.available(self.a):
            ones = self.a.new_ones(rows.stop - rows.start, spec.k)
            return dropout.dropped(ones, seed, spec.stream, spec.dropout, rows.start)
        bounds = (rows.start, rows.stop)
        return keep_mask(seed, spec.stream, spec.dropout, bounds, spec.k, dtype=self.a.dtype)

    def dropped(self, x: Tensor, rows: slice) -> Tensor:
        """Return `rows` of x [M, K], dropped out but not scaled. Needs `dropout.available`."""
        seed, spec, x = self.tensors.seed, self.spec, cut(x, rows)
        if seed is None:
            return x
        return dropout.dropped(x, seed, spec.stream, spec.dropout, rows.start)

    def add_dropped(self, total: Tensor, low: Tensor, rows: slice) -> None:
        """Add low @ A [m, K], dropped out, to `total`, the rows `rows` of all. Needs
        `is_thin(total)` and a seed."""
        seed, spec = self.tensors.seed, self.spec
        assert seed is not None
        added = add_product(total.clone(), low, self.a)
        dropout.put(added, total, seed, spec.stream, spec.dropout, rows.start)


@dataclass(frozen=True)
class NativeAdapters:
    """A group's adapters, by their Linear's position in it. rank: the sum of theirs."""

    x: Tensor
    dtype: torch.dtype
    rank: int
    members: dict[int, NativeAdapter]

    @classmethod
    def of(cls, group: Group, gemm_dtype: torch.dtype) -> NativeAdapters | None:
        """Return the adapters of a group, None without any. If the base product runs in a wider
        dtype, so do the adapters'."""
        first, spec = group[0]
        wider = gemm_dtype.itemsize > spec.lora_dtype.itemsize
        dtype = gemm_dtype if wider else spec.lora_dtype
        members = {}
        rank = 0
        for position, (tensors, spec) in enumerate(group):
            a, b = tensors.lora_a, tensors.lora_b
            if a is None or b is None:
                continue
            columns = slice(rank, rank + a.shape[0])
            scaling = adapter_scaling(tensors, spec)
            factors = (a.to(dtype), b.to(dtype))
            members[position] = NativeAdapter(tensors, spec, *factors, scaling, columns)
            rank = columns.stop
        return cls(first.x, dtype, rank, members) if members else None

    @functools.cached_property
    def stacked(self) -> Tensor:
        """All A's in one tensor [rank, K]."""
        factors = [member.a for member in self.members.values()]
        return factors[0] if len(factors) == 1 else torch.cat(factors)

    @property
    def masked(self) -> bool:
        """Whether dropout gives each adapter an input of its own."""
        return any(member.tensors.seed is not None for member in self.members.values())

    @property
    def plain(self) -> bool:
        """Whether the products take x as it is."""
        return self.x.dtype == self.dtype and not self.masked

    def is_thin(self, rows: Tensor) -> bool:
        """Whether the thin kernels multiply `rows`, dropped out or not, in the dtype they have."""
        drops = not self.masked or dropout.available(rows)
        return drops and thin.available(rows, self.dtype)

    def low_ranks(self) -> dict[int, Tensor]:
        """Return S of each member, scaling * drop(x) aᵀ [M, R] in `dtype`, and write it if the
        forward has to return it."""
        x = self.x
        if self.is_thin(x):
            x = contiguous_rows(x)
            lows = {}
            for position, member in self.members.items():
                low = member.tensors.low_rank
                if low is None or low.dtype != self.dtype:
                    low = x.new_empty(len(x), len(member.a), dtype=self.dtype)
                for m in row_blocks(x, whole=not self.masked):
                    given = member.dropped(x, m)
                    thin.product(given, member.a, cut(low, m), float(member.scaling))
                lows[position] = low
        else:
            low = self._low_rank()
            lows = {i: cut(low, slice(0, len(x)), m.columns) for i, m in self.members.items()}
        for position, member in self.members.items():
            saved = member.tensors.low_rank
            if saved is not None and saved is not lows[position]:
                saved.copy_(lows[position])
        return lows

    def _low_rank(self) -> Tensor:
        """Return S of all members in one [M, rank]."""
        x = self.x
        low = x.new_empty(x.shape[0], self.rank, dtype=self.dtype)
        for m in row_blocks(x, whole=self.plain):
            if not self.masked:
                torch.mm(x[m].to(self.dtype), self.stacked.t(), out=low[m])
                continue
            for member in self.members.values():
                mask = member.mask(m)
                part = x[m].to(self.dtype) if mask is None else mask.mul_(x[m])
                low[m, member.columns] = part @ member.a.t()
        for member in self.members.values():
            low[:, member.columns] *= member.scaling
        return low

    def stored(self) -> dict[int, Tensor] | None:
        """Return S of each member as the forward stored it, None if it did not."""
        parts = {i: member.tensors.low_rank for i, member in self.members.items()}
        saved = {i: part.to(self.dtype) for i, part in parts.items() if part is not None}
        return saved if len(saved) == len(parts) else None


class NativeGradients:
    """Sums up the gradients of a group's adapters over blocks of rows, and adds the adapters' part
    of the gradient of x. needs: `needs.x` is set if that part is to be added here."""

    def __init__(self, adapters: NativeAdapters, needs: NeedsGradient) -> None:
        self.adapters = adapters
        self.needs = needs
        self.lows: dict[int, Tensor] = {}
        if needs.adapter:
            stored = adapters.stored()
            self.lows = adapters.low_ranks() if stored is None else stored
        x = adapters.x
        self.grad_low = x.new_empty(x.shape[0], adapters.rank, dtype=adapters.dtype)
        wide = torch.promote_types(torch.float32, adapters.dtype)
        self._a = x.new_zeros(adapters.rank, x.shape[1], dtype=wide)
        self._b: dict[int, Tensor] = {}

    def take(self, position: int, rows: slice, grad: Tensor, product: Tensor | None = None) -> None:
        """Take the rows `rows` of one Linear's gradient [m, N]. product: these rows times lora_b,
        if the caller has computed it."""
        member = self.adapters.members[position]
        grad_low = cut(self.grad_low, rows, member.columns)
        low = cut(self.lows[position], rows) if self.lows else None
        if product is None and self.adapters.is_thin(grad) and len(grad) == len(self.grad_low):
            grad = contiguous_rows(grad)
            thin.product(grad, member.b.t(), grad_low, float(member.scaling))
            if low is not None:
                self._b[position] = torch.empty_like(member.b).t()
                thin.gradient(low, grad, self._b[position])
            return
        grad = grad.to(self.adapters.dtype)
        if product is None:
            product = grad @ member.b
        torch.mul(product, member.scaling, out=grad_low)  # pyright: ignore[reportCallIssue]
        if low is not None:
            # The other way round torch multiplies half as fast.
            accumulate(self._sum_b(position), low, grad)

    def _sum_b(self, position: int) -> Tensor:
        """Return the sum for the transpose of one Linear's B."""
        if position not in self._b:
            n, rank = self.adapters.members[position].b.shape
            self._b[position] = self._a.new_zeros(rank, n)
        return self._b[position]

    def finish(self, grad_x: Tensor | None) -> None:
        """Add the parts of the taken rows to the gradients of all A's, and to `grad_x` [M, K] if
        `needs.x`."""
        adapters = self.adapters
        x = adapters.x
        total = grad_x if self.needs.x else None
        whole = total is None or total.dtype == x.dtype
        # `total` is contiguous, so that the product is added in place.
        if adapters.is_thin(x) and whole:
            self._finish_thin(contiguous_rows(x), total)
            return
        for m in row_blocks(x, whole=adapters.plain and whole):
            target = None if total is None else total[m]
            wide = x[m].to(adapters.dtype) if self.needs.adapter else None
            if not adapters.masked:
                self._finish(m, adapters.stacked, slice(None), wide, None, target)
                continue
            for member in adapters.members.values():
                self._finish(m, member.a, member.columns, wide, member.mask(m), target)

    def _finish_thin(self, x: Tensor, total: Tensor | None) -> None:
        """Do as `finish` with x of contiguous rows, for which `is_thin` holds."""
        adapters = self.adapters
        if not adapters.masked:
            if total is not None:
                add_product(total, self.grad_low, adapters.stacked)
            if self.needs.adapter:
                thin.gradient(self.grad_low, x, self._a)
            return
        for m, member in itertools.product(row_blocks(x, whole=False), adapters.members.values()):
            low = self.grad_low[m, member.columns]
            if total is not None:
                member.add_dropped(total[m], low, m)
            if self.needs.adapter:
                part = self._a.new_empty(len(member.a), x.shape[1])
                thin.gradient(low, member.dropped(x, m), part)
                self._a[member.columns] += part

    def _finish(
        self,
        rows: slice,
        a: Tensor,
        columns: slice,
        x: Tensor | None,
        mask: Tensor | None,
        target: Tensor | None,
    ) -> None:
        """Add the part of `rows` to the gradient of x in `target`, and to that of the factor
        `a`."""
        grad_low = self.grad_low[rows, columns]
        if target is not None:
            if mask is None:
                added = add_product(target, grad_low, a)
            else:
                product = grad_low @ a
                same = target.dtype == product.dtype
                added = torch.addcmul(target, product, mask, out=target if same else None)
            if added is not target:
                target.copy_(added)
        if x is not None:
            accumulate(self._a[columns], grad_low, x if mask is None else mask.mul_(x))

    def of(self, position: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of lora_a and lora_b of one Linear, in their own dtypes."""
        member = self.adapters.members.get(position)
        if member is None or not self.needs.adapter:
            return None, None
        a, b = member.tensors.lora_a, member.tensors.lora_b
        assert a is not None
        assert b is not None
        # Each member has memory of its own, because an op must not return two views of one tensor.
        grad_a = self._a[member.columns].to(a.dtype, copy=len(self.adapters.members) > 1)
        return grad_a, self._sum_b(position).t().to(b.dtype).contiguous()


def contiguous_rows(rows: Tensor) -> Tensor:
    """Return `rows`, each of them contiguous."""
    return rows if rows.stride(1) == 1 else rows.contiguous()
