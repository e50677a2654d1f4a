"""dense: dequantise the weight, multiply with the vendor GEMM, add the adapter by addmm.

Native torch ops only, so it runs on every device; the baseline for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.formats.formats import UNQUANTIZED
from qlora_compile.kernels.variants.base import (
    Config,
    LinearGradients,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    Variant,
    adapter_scaling,
)
from qlora_compile.packed import PackedWeight
from qlora_compile.problem import Problem

ROW_BLOCK = 512
"""Rows of x converted or dropped out at a time, so that no [M, K] or [M, N] copy is made."""

DEVICE_ROW_BLOCKS = 8
"""CPU row blocks in one of another device, where each costs a dozen kernel launches."""

WEIGHT_BLOCK = 1 << 21
"""Weights dequantised at a time on CPU: 8 MB of float32 stay in its last cache and in memory the
allocator keeps, and GEMMs this large lose nothing by being cut."""

REDECODED_BLOCKS = 4
"""Above this many row blocks, dequantising the whole weight once costs less than block by block
for every one of them."""


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    # Without native support torch multiplies bfloat16 about ten times slower than float32, and
    # float16 on any CPU several times slower.
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which `device` multiplies `dtype` operands without loss of accuracy or speed."""
    low_precision = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu" and low_precision and not _cpu_multiplies(dtype):
        return torch.float32
    return dtype


def _row_blocks(x: Tensor, whole: bool) -> list[slice]:
    rows = x.shape[0]
    block = ROW_BLOCK if x.device.type == "cpu" else ROW_BLOCK * DEVICE_ROW_BLOCKS
    step = max(rows, 1) if whole else block
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _weight_blocks(
    planes: Sequence[Tensor], spec: LinearSpec, dtype: torch.dtype, cut: bool
) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    """What goes through the weight once: pairs (n, W[n] in `dtype`), a single one unless `cut`.

    A block is valid until the next one is taken.
    """
    spec_format, rows = spec.format, spec.n
    if spec_format is not None and planes[0].device.type == "cpu" and cut:
        shape = (spec.n, spec.k)
        packed = PackedWeight.from_planes(spec_format.name, shape, spec.block_size, planes)
        alignment = spec_format.row_alignment(packed)
        rows = max(WEIGHT_BLOCK // spec.k // alignment, 1) * alignment
        if rows < spec.n:
            buffer = planes[0].new_empty(rows, spec.k, dtype=dtype)

            def blocks() -> Iterator[tuple[slice, Tensor]]:
                for start in range(0, spec.n, rows):
                    stop = min(start + rows, spec.n)
                    block = buffer[: stop - start]
                    yield (
                        slice(start, stop),
                        spec_format.dequantize_rows(packed, start, stop, dtype, block),
                    )

            return blocks
    whole = (slice(0, spec.n), spec.dequantize(planes, dtype))
    return lambda: iter((whole,))


def _keep_mask(
    tensors: LinearTensors, spec: LinearSpec, rows: slice, dtype: torch.dtype
) -> Tensor | None:
    if tensors.seed is None:
        return None
    bounds = (rows.start, rows.stop)
    return keep_mask(tensors.seed, spec.stream, spec.dropout, bounds, spec.k, dtype)


class Dense(Variant):
    name = "dense"

    def rejects(self, problem: Problem) -> list[str]:
        return []

    def cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        m, n, k = problem.m, problem.n, problem.k
        total = device.gemm_seconds(m, n, k, device.vendor_efficiency) + LAUNCH_SECONDS
        if problem.format != UNQUANTIZED:
            # torch's own operators: codes widened, looked up, scaled and rounded one after another.
            total += device.stream_seconds(n * k * 30) + 12 * LAUNCH_SECONDS
        if problem.rank:
            # x is read and y or dX updated once more for the adapter, dropout by ten operators.
            total += device.stream_seconds(2 * m * (k + 2 * n)) + 4 * LAUNCH_SECONDS
        if problem.dropout:
            total += device.stream_seconds(m * k * 20) + 60 * LAUNCH_SECONDS
        return total

    def forward(self, tensors: LinearTensors, spec: LinearSpec, config: Config) -> Tensor:
        x, a, b = tensors.x, tensors.lora_a, tensors.lora_b
        base_dtype = gemm_dtype(spec.compute_dtype, x.device)
        lora_dtype = gemm_dtype(spec.lora_dtype, x.device)
        scaling = adapter_scaling(tensors, spec)
        bias = None if tensors.bias is None else tensors.bias.to(base_dtype)
        if a is not None and b is not None:
            a, b = a.to(lora_dtype), b.to(lora_dtype)
        plain = {x.dtype, spec.out_dtype, base_dtype} == {base_dtype}
        adapter_plain = a is None or (lora_dtype == base_dtype and tensors.seed is None)
        blocks = _row_blocks(x, whole=plain and adapter_plain)
        weight = _weight_blocks(
            tensors.planes, spec, base_dtype, cut=len(blocks) <= REDECODED_BLOCKS
        )
        y = x.new_empty(x.shape[0], spec.n, dtype=spec.out_dtype)
        for m in blocks:
            base_x = x[m].to(base_dtype)
            low_rank = None
            if a is not None:
                adapter_x = base_x if lora_dtype == base_dtype else x[m].to(lora_dtype)
                keep = _keep_mask(tensors, spec, m, lora_dtype)
                low_rank = (adapter_x if keep is None else keep.mul_(adapter_x)) @ a.t()
            for n, block in weight():
                part = target = y[m, n]
                if y.dtype != base_dtype:
                    part = torch.empty_like(target, dtype=base_dtype)
                if bias is None:
                    torch.mm(base_x, block.t(), out=part)
                else:
                    torch.addmm(bias[n], base_x, block.t(), out=part)
                if low_rank is not None and b is not None:
                    part = _add_product(part, low_rank, b[n].t(), scaling)
                if part is not target:
                    target.copy_(part)
        return y

    def backward(
        self,
        grad: Tensor,
        tensors: LinearTensors,
        spec: LinearSpec,
        needs: NeedsGradient,
        config: Config,
    ) -> LinearGradients:
        x, a, b = tensors.x, tensors.lora_a, tensors.lora_b
        base_dtype = gemm_dtype(spec.compute_dtype, x.device)
        lora_dtype = gemm_dtype(spec.lora_dtype, x.device)
        scaling = adapter_scaling(tensors, spec)
        lora_a = lora_b = total_a = total_b = None
        if a is not None and b is not None:
            lora_a, lora_b = a.to(lora_dtype), b.to(lora_dtype)
            if needs.adapter:
                # Block sums are accumulated in at least float32.
                total_a, total_b = (
                    t.new_zeros(t.shape, dtype=torch.promote_types(torch.float32, t.dtype))
                    for t in (a, b)
                )
        plain = {x.dtype, grad.dtype, base_dtype} == {base_dtype}
        adapter_plain = a is None or (lora_dtype == base_dtype and tensors.seed is None)
        blocks = _row_blocks(x, whole=plain and adapter_plain)
        weight = grad_x = None
        if needs.x:
            # A low-precision sum over blocks would be rounded after each of them.
            cut = len(blocks) <= REDECODED_BLOCKS and base_dtype.itemsize >= 4
            weight = _weight_blocks(tensors.planes, spec, base_dtype, cut)
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for m in blocks:
            base_grad = grad[m].to(base_dtype)
            target = part = None
            if weight is not None and grad_x is not None:
                part = target = grad_x[m]
                if x.dtype != base_dtype:
                    part = torch.empty_like(target, dtype=base_dtype)
                for n, block in weight():
                    beta = 0 if n.start == 0 else 1
                    torch.addmm(part, base_grad[:, n], block, beta=beta, out=part)
            if lora_a is not None and lora_b is not None and (needs.x or needs.adapter):
                adapter_grad = base_grad if lora_dtype == base_dtype else grad[m].to(lora_dtype)
                grad_low_rank = (adapter_grad @ lora_b).mul_(scaling)
                keep = _keep_mask(tensors, spec, m, lora_dtype)
                if total_a is not None and total_b is not None:
                    adapter_x = x[m].to(lora_dtype)
                    if keep is not None:
                        adapter_x = adapter_x * keep
                    _accumulate(total_a, grad_low_rank, adapter_x)
                    _accumulate(total_b, adapter_grad, (adapter_x @ lora_a.t()).mul_(scaling))
                if part is not None and keep is None:
                    part = _add_product(part, grad_low_rank, lora_a)
                elif part is not None and keep is not None:
                    product = grad_low_rank @ lora_a
                    same = part.dtype == product.dtype
                    part = torch.addcmul(part, product, keep, out=part if same else None)
            if target is not None and part is not None and part is not target:
                target.copy_(part)
        grad_bias = None
        if needs.bias and tensors.bias is not None:
            total = grad.new_zeros(spec.n, dtype=torch.promote_types(torch.float32, grad.dtype))
            # torch sums in another dtype by way of a copy of the whole.
            for m in _row_blocks(grad, whole=grad.dtype == total.dtype):
                total += grad[m].sum(0, dtype=total.dtype)
            grad_bias = total.to(tensors.bias.dtype)
        return LinearGradients(
            x=grad_x,
            lora_a=None if a is None or total_a is None else total_a.to(a.dtype),
            lora_b=None if b is None or total_b is None else total_b.to(b.dtype),
            bias=grad_bias,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """total + alpha * left @ right: in place, or in the wider of two dtypes."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right, alpha=alpha)
    return torch.add(total, left @ right, alpha=alpha)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ @ right."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total.add_(left.t() @ right)
