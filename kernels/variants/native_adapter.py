"""The adapter's thin products and gradients in torch's own operators, over blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.variants.base import (
    ROW_BLOCK,
    Group,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    adapter_scaling,
)

DEVICE_ROW_BLOCKS = 8
"""CPU row blocks in one of another device, where each costs a dozen kernel launches."""


def native_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    """Those a CPU may multiply operands of `dtype` in without losing accuracy, its own way first:
    without native support torch multiplies 16-bit ones several times slower than float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return [dtype]
    native = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [dtype, torch.float32] if native else [torch.float32, dtype]


def row_blocks(x: Tensor, whole: bool) -> list[slice]:
    """All rows of x [M, …] at once, or in blocks."""
    rows = x.shape[0]
    block = ROW_BLOCK if x.device.type == "cpu" else ROW_BLOCK * DEVICE_ROW_BLOCKS
    step = max(rows, 1) if whole else block
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class NativeAdapter:
    """The adapter of one Linear of a group, its factors in the `dtype` its products run in.

    scaling: alpha / rank, and 1 / (1 - p) of what dropout keeps. columns: of the group's S that
    are this adapter's.
    """

    tensors: LinearTensors
    spec: LinearSpec
    a: Tensor
    b: Tensor
    dtype: torch.dtype
    scaling: float
    columns: slice

    def keep(self, rows: slice) -> Tensor | None:
        """The dropout mask of `rows` of x, in `dtype`."""
        if self.tensors.seed is None:
            return None
        spec, bounds = self.spec, (rows.start, rows.stop)
        return keep_mask(
            self.tensors.seed, spec.stream, spec.dropout, bounds, spec.k, dtype=self.dtype
        )


@dataclass(frozen=True)
class NativeAdapters:
    """A group's adapters, by their Linear's position in it, and their A's in one [sum of r, K]."""

    x: Tensor
    dtype: torch.dtype
    stacked: Tensor
    members: dict[int, NativeAdapter]

    @classmethod
    def of(cls, group: Group, gemm_dtype: torch.dtype) -> NativeAdapters | None:
        """None without an adapter. Where the base product runs wider, so does the adapters'."""
        first, spec = group[0]
        wider = gemm_dtype.itemsize > spec.lora_dtype.itemsize
        dtype = gemm_dtype if wider else spec.lora_dtype
        factors = []
        members = {}
        rank = 0
        for position, (tensors, spec) in enumerate(group):
            a, b = tensors.lora_a, tensors.lora_b
            if a is None or b is None:
                continue
            columns = slice(rank, rank + a.shape[0])
            scaling = adapter_scaling(tensors, spec)
            factors.append(a.to(dtype))
            members[position] = NativeAdapter(
                tensors, spec, factors[-1], b.to(dtype), dtype, scaling, columns
            )
            rank = columns.stop
        if not members:
            return None
        stacked = factors[0] if len(factors) == 1 else torch.cat(factors)
        return cls(first.x, dtype, stacked, members)

    @property
    def masked(self) -> bool:
        """Whether dropout gives each adapter an input of its own."""
        return any(member.tensors.seed is not None for member in self.members.values())

    @property
    def plain(self) -> bool:
        """Whether the products take x as it is."""
        return self.x.dtype == self.dtype and not self.masked

    def low_rank(self) -> Tensor:
        """S: scaling * drop(x) aᵀ of each member in its columns, [M, sum of ranks] in `dtype`."""
        x = self.x
        low = x.new_empty(x.shape[0], self.stacked.shape[0], dtype=self.dtype)
        for m in row_blocks(x, whole=self.plain):
            if not self.masked:
                torch.mm(x[m].to(self.dtype), self.stacked.t(), out=low[m])
                continue
            for member in self.members.values():
                keep = member.keep(m)
                part = x[m].to(self.dtype) if keep is None else keep.mul_(x[m])
                low[m, member.columns] = part @ member.a.t()
        for member in self.members.values():
            low[:, member.columns] *= member.scaling
        return low

    def store(self, low_rank: Tensor) -> None:
        """Writes S where the forward has to return it."""
        for member in self.members.values():
            if member.tensors.low_rank is not None:
                member.tensors.low_rank.copy_(low_rank[:, member.columns])

    def stored(self) -> Tensor | None:
        """S as the forward stored it."""
        parts = [member.tensors.low_rank for member in self.members.values()]
        kept = [part.to(self.dtype) for part in parts if part is not None]
        return torch.cat(kept, dim=1) if len(kept) == len(parts) else None


class NativeGradients:
    """Sums up the gradients of a group's adapters, and what they add to that of x, over blocks of
    rows. needs: `needs.x` where the latter is wanted here."""

    def __init__(self, adapters: NativeAdapters, needs: NeedsGradient) -> None:
        self.adapters = adapters
        self.needs = needs
        x, stacked, dtype = adapters.x, adapters.stacked, adapters.dtype
        self.low = None
        if needs.adapter:
            stored = adapters.stored()
            self.low = adapters.low_rank() if stored is None else stored
        self.grad_low = x.new_empty(x.shape[0], stacked.shape[0], dtype=dtype)
        wide = torch.promote_types(torch.float32, dtype)
        self._a = stacked.new_zeros(stacked.shape, dtype=wide)
        self._b = {
            position: member.b.new_zeros(member.b.shape, dtype=wide)
            for position, member in adapters.members.items()
        }

    def take(self, position: int, rows: slice, grad: Tensor, product: Tensor | None = None) -> None:
        """The rows `rows` of one Linear's gradient [m, N], in the adapters' dtype, and its product
        with lora_b, where that is known."""
        member = self.adapters.members[position]
        if product is None:
            product = grad @ member.b
        torch.mul(product, member.scaling, out=self.grad_low[rows, member.columns])
        if self.low is not None:
            _accumulate(self._b[position], grad, self.low[rows, member.columns])

    def finish(self, grad_x: Tensor | None) -> None:
        """Adds up what the rows taken give to A, and to `grad_x` [M, K] if it is needed."""
        adapters = self.adapters
        x = adapters.x
        total = grad_x if self.needs.x else None
        for m in row_blocks(x, whole=adapters.plain and (total is None or total.dtype == x.dtype)):
            wide = x[m].to(adapters.dtype) if self.needs.adapter else None
            if not adapters.masked:
                self._finish(m, self.adapters.stacked, slice(None), wide, None, total)
                continue
            for member in adapters.members.values():
                keep = member.keep(m)
                self._finish(m, member.a, member.columns, wide, keep, total)

    def _finish(
        self,
        rows: slice,
        a: Tensor,
        columns: slice,
        x: Tensor | None,
        keep: Tensor | None,
        total: Tensor | None,
    ) -> None:
        grad_low = self.grad_low[rows, columns]
        if total is not None:
            target = total[rows]
            if keep is None:
                added = add_product(target, grad_low, a)
            else:
                product = grad_low @ a
                same = target.dtype == product.dtype
                added = torch.addcmul(target, product, keep, out=target if same else None)
            if added is not target:
                target.copy_(added)
        if x is not None:
            _accumulate(self._a[columns], grad_low, x if keep is None else keep.mul_(x))

    def of(self, position: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of lora_a and lora_b of one Linear, in their own dtypes."""
        member = self.adapters.members.get(position)
        if member is None or not self.needs.adapter:
            return None, None
        a, b = member.tensors.lora_a, member.tensors.lora_b
        assert a is not None
        assert b is not None
        # Of a member its own memory: an op returns no two views of one tensor.
        grad_a = self._a[member.columns].to(a.dtype, copy=len(self._b) > 1)
        return grad_a, self._b[position].to(b.dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total.add_(left.t() @ right)


def adds_in_place(total: torch.dtype, factors: torch.dtype) -> bool:
    """Whether `add_product` needs no copy of a sum in that dtype."""
    return total == factors or (total, factors) == (torch.bfloat16, torch.float32)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right: in place, or in the wider of two dtypes."""
    if not adds_in_place(total.dtype, left.dtype):
        return torch.add(total, left @ right)
    if total.dtype != left.dtype:
        left, right = _in_three(left, right)
    return total.addmm_(left, right)


def _in_three(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in bfloat16 whose product is left @ right of float32 but for 2^-16 of its terms: each
    is the sum of two bfloat16 numbers, and of the four products of these the smallest is left out.

    One pass over a bfloat16 sum, where a float32 product takes three. (Henry, Tang and Heinecke
    2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
    Computations".)
    """
    left_high, right_high = left.bfloat16(), right.bfloat16()
    left_low, right_low = (left - left_high).bfloat16(), (right - right_high).bfloat16()
    return (
        torch.cat((left_high, left_low, left_high), dim=1),
        torch.cat((right_high, right_high, right_low)),
    )
