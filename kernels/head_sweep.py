"""Computes the loss and its gradients from a head's logits, a few rows and entries at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.cpu import softmax
from qlora_compile.kernels.cpu.slow_products import is_looped
from qlora_compile.kernels.layout import slices
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named
from qlora_compile.kernels.workspace import workspace

SMALLEST_BUDGET = 1 << 22
"""The least number of logits of a chunk: with fewer the weight would be read for too few rows."""

WEIGHT_BLOCK = 1 << 20
"""Entries of a weight that are cast at a time, in cache, if the logits' gradient overwrites the
logits."""

IN_PLACE = 4
"""A chunk has this many times as many logits if their gradient overwrites them: without float32
copies they need no more memory."""


@dataclass(frozen=True)
class HeadSettings:
    """The constants of one call, as `chunked_cross_entropy` explains them.

    packed: the weight if it is packed, else None. size: V. compute: the dtype of the base product.
    mean: whether the loss is the mean; if not, the sum. differentiates: whether gradients are
    wanted.
    """

    packed: PackedWeight | None
    size: int
    compute: torch.dtype
    scaling: float
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    ignore_index: int
    mean: bool
    chunk: int | None
    vocabulary_chunk: int | None
    differentiates: bool


def asked_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of a product of `hidden`: autocast's where it casts, else hidden's own."""
    device = hidden.device.type
    # Autocast leaves float64 alone.
    casts = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else hidden.dtype


def computed_in(hidden: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of products that are wanted in `dtype`."""
    return torch.float32 if is_looped(hidden, dtype) else dtype


def fits_in_place(hidden: Tensor, weight: Tensor, compute: torch.dtype) -> bool:
    """Whether the gradient of logits that only a weight makes can overwrite them. A 16-bit product
    that writes some columns of a wide result takes far longer."""
    available = softmax.available(hidden.device, compute)
    return available and compute in (weight.dtype, torch.float32)


class Sweep:
    """One pass over the logits, block by block: the sum of the losses and its gradients.

    All sums are in `wide` dtype: float32, or float64 for float64. sums: those of each row, [., M].
    detailed: whether to have all of `softmax.cross_entropy_rows`, which only a sweep in place does.
    """

    def __init__(
        self,
        tensors: tuple[Tensor | None, ...],
        needs: list[bool],
        labels: Tensor,
        settings: HeadSettings,
        detailed: bool = False,
    ) -> None:
        hidden, self.weight, bias, lora_a, lora_b = tensors
        assert hidden is not None
        self.hidden, self.labels, self.settings = hidden, labels, settings
        self.valid = labels != settings.ignore_index
        self.wide = wide = torch.promote_types(torch.float32, settings.compute)
        self.compute = computed_in(hidden, settings.compute)
        self.bias = None if bias is None else bias.to(wide)
        self.lora_a = None if lora_a is None else lora_a.to(wide)
        self.lora_b = None if lora_b is None else lora_b.to(wide)
        self.in_place = (
            self.weight is not None
            and fits_in_place(hidden, self.weight, self.compute)
            and settings.vocabulary_chunk is None
            and settings.softcap is None
            and bias is None
            and lora_a is None
        )
        self.rows, self.blocks = self._partition()

        def zeros(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return hidden.new_zeros(shape, dtype=dtype)

        rows, width = hidden.shape
        rank = 0 if lora_a is None else lora_a.shape[0]
        self.low_rank = zeros(rows, rank)
        self.sums = zeros(softmax.DETAILED if detailed else softmax.SUMS, rows)
        self.log_sum, self.target, self.total = self.sums[: softmax.SUMS]
        self.log_sum.fill_(-math.inf)
        # With one block every row of the gradient is written once.
        narrow = hidden.dtype if len(self.blocks) == 1 else wide
        self.grad_hidden = zeros(rows, width, dtype=narrow) if needs[0] else None
        self.grad_weight = zeros(settings.size, width) if needs[1] else None
        self.grad_bias = zeros(settings.size) if needs[2] else None
        self.grad_a = zeros(rank, width) if needs[3] else None
        self.grad_b = zeros(settings.size, rank) if needs[4] else None
        self.grad_low_rank = zeros(rows, rank)
        self.differentiates = any(needs)

    def _partition(self) -> tuple[list[slice], list[slice]]:
        """Return how many rows of `hidden`, and of the weight, to take at a time."""
        rows, width = self.hidden.shape
        settings = self.settings
        budget = max(self.hidden.numel(), SMALLEST_BUDGET) * (IN_PLACE if self.in_place else 1)
        converted = self.weight is None or self.weight.dtype != self.compute
        block = settings.vocabulary_chunk
        if block is None:
            entries = WEIGHT_BLOCK if self.in_place else budget
            block = entries // max(width, 1) if converted else settings.size
        if settings.packed is not None:
            unit = format_named(settings.packed.format).row_alignment(settings.packed.layout)
            block = max(block // unit, 1) * unit
        block = max(min(block, settings.size), 1)
        columns = settings.size if self.in_place else block
        count = -(-rows // (settings.chunk or max(budget // columns, 1)))
        chunk = -(-rows // max(count, 1))
        return slices(rows, chunk), slices(settings.size, block)

    def run(self) -> tuple[Tensor, list[Tensor | None]]:
        """Return the sum of the losses of all rows that count, and its gradients with respect to
        hidden, weight, bias, lora_a and lora_b, None for those that are not needed."""
        settings = self.settings
        if self.lora_a is not None:
            for rows in self.rows:
                part = self.hidden[rows].to(self.wide) @ self.lora_a.t()
                self.low_rank[rows] = part.mul_(settings.scaling)
        if self.in_place:
            for rows in self.rows:
                self._run_in_place(rows)
            return self._results()
        once = len(self.blocks) == 1
        for weight, block in self._weights():
            for rows in self.rows:
                logits = self._logits(rows, weight, block)
                self._count(rows, logits, block)
                if once and self.differentiates:
                    self._differentiate(rows, logits, weight, block)
                del logits  # before the next chunk's are made
        if not once and self.differentiates:
            for weight, block in self._weights():
                for rows in self.rows:
                    logits = self._logits(rows, weight, block)
                    self._differentiate(rows, logits, weight, block)
                    del logits
        self._through_adapter()
        return self._results()

    def _results(self) -> tuple[Tensor, list[Tensor | None]]:
        """What `run` returns."""
        settings = self.settings
        smoothing = settings.label_smoothing
        losses = self.log_sum - (1.0 - smoothing) * self.target
        if smoothing:
            losses -= smoothing / settings.size * self.total
        gradients = [
            *(self.grad_hidden, self.grad_weight, self.grad_bias),
            *(self.grad_a, self.grad_b),
        ]
        return losses.masked_fill_(~self.valid, 0.0).sum(), gradients

    def _weights(self) -> Iterator[tuple[Tensor, slice]]:
        """Yield each block of the weight [block, K] in the product's dtype, and its place."""
        packed, dtype = self.settings.packed, self.compute
        for block in self.blocks:
            if packed is not None:
                rows = (block.start, block.stop)
                yield format_named(packed.format).dequantize_rows(packed, *rows, dtype), block
            elif self.weight is not None:
                yield self.weight[block].to(dtype), block

    def _logits(self, rows: slice, weight: Tensor, block: slice) -> Tensor:
        """Return the logits [rows, block]."""
        settings = self.settings
        logits = (self.hidden[rows].to(self.compute) @ weight.t()).to(self.wide)
        if self.bias is not None:
            logits += self.bias[block]
        if self.lora_b is not None:
            logits.addmm_(self.low_rank[rows], self.lora_b[block].t())
        if settings.softcap is not None:
            factor = settings.logit_scale / settings.softcap
            return logits.mul_(factor).tanh_().mul_(settings.softcap)
        return logits.mul_(settings.logit_scale) if settings.logit_scale != 1.0 else logits

    def _run_in_place(self, rows: slice) -> None:
        """Do all of `rows` in place, if only the weight makes their logits."""
        settings = self.settings
        hidden = self.hidden[rows].to(self.compute)
        shape = (len(hidden), settings.size)
        logits = workspace(*shape, dtype=hidden.dtype, device=hidden.device)
        for weight, block in self._weights():
            torch.mm(hidden, weight.t(), out=logits[:, block])
        softmax.cross_entropy_rows(
            logits,
            self.labels[rows].contiguous(),
            self.sums[:, rows],
            factor=settings.logit_scale,
            smoothing=settings.label_smoothing,
            ignored=settings.ignore_index,
            differentiates=self.differentiates,
        )
        if self.differentiates:
            for weight, block in self._weights():
                self._through_weight(rows, logits[:, block], weight, block)

    def _targets(self, rows: slice, block: slice) -> tuple[Tensor, Tensor]:
        """Return each row's label as a column of the block, [rows, 1], and whether it is in it."""
        local = self.labels[rows] - block.start
        inside = self.valid[rows] & (local >= 0) & (local < block.stop - block.start)
        return local.clamp(0, block.stop - block.start - 1).unsqueeze(1), inside.unsqueeze(1)

    def _count(self, rows: slice, logits: Tensor, block: slice) -> None:
        """Add the block to the rows' log-sum-exp, label's logit and sum of logits."""
        column, inside = self._targets(rows, block)
        self.log_sum[rows] = torch.logaddexp(self.log_sum[rows], logits.logsumexp(1))
        # Not a product with `inside`: the infinite logit of another label would be NaN.
        self.target[rows] += logits.gather(1, column).masked_fill_(~inside, 0.0).squeeze(1)
        if self.settings.label_smoothing:
            self.total[rows] += logits.sum(1)

    def _differentiate(self, rows: slice, logits: Tensor, weight: Tensor, block: slice) -> None:
        """Add the block's part to every gradient; overwrite `logits`."""
        settings = self.settings
        slope = None
        if settings.softcap is not None:
            slope = logits.div(settings.softcap).square_().neg_().add_(1.0)
        grad = logits.sub_(self.log_sum[rows].unsqueeze(1)).exp_()
        if settings.label_smoothing:
            grad.sub_(settings.label_smoothing / settings.size)
        column, inside = self._targets(rows, block)
        share = inside.to(self.wide).mul_(1.0 - settings.label_smoothing)
        grad.scatter_(1, column, grad.gather(1, column) - share)
        grad.mul_(self.valid[rows].unsqueeze(1))
        if slope is not None:
            grad.mul_(slope)
        if settings.logit_scale != 1.0:
            grad.mul_(settings.logit_scale)
        if self.grad_bias is not None:
            self.grad_bias[block] += grad.sum(0)
        if self.lora_b is not None:
            self.grad_low_rank[rows].addmm_(grad, self.lora_b[block])
        if self.grad_b is not None:
            self.grad_b[block].addmm_(grad.t(), self.low_rank[rows])
        self._through_weight(rows, grad, weight, block)

    def _through_weight(self, rows: slice, grad: Tensor, weight: Tensor, block: slice) -> None:
        """Add to the gradients of `hidden` and the weight, given that of the base product."""
        if self.grad_hidden is not None:
            target, narrow = self.grad_hidden[rows], grad.to(self.compute)
            if target.dtype == narrow.dtype:
                torch.addmm(target, narrow, weight, out=target)
            else:
                target += narrow @ weight
        if self.grad_weight is not None:
            # Not yet divided by the number of rows, this sum could be too large for float16.
            half = self.compute == torch.float16
            dtype = self.wide if half else self.compute
            self.grad_weight[block] += grad.t().to(dtype) @ self.hidden[rows].to(dtype)

    def _through_adapter(self) -> None:
        """Add to the gradients of lora_a and `hidden`, given that of the low-rank product."""
        if self.lora_a is None or not self.differentiates:
            return
        for rows in self.rows:
            grad = self.grad_low_rank[rows].mul_(self.settings.scaling)
            if self.grad_a is not None:
                self.grad_a.addmm_(grad.t(), self.hidden[rows].to(self.wide))
            if self.grad_hidden is not None:
                self.grad_hidden[rows] += grad @ self.lora_a
