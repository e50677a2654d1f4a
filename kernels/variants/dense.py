"""dense: dequantise the weight, multiply with the vendor GEMM, add the adapter by addmm.

Native torch ops only, so it runs on every device; the baseline for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, CpuModel, DeviceModel
from qlora_compile.kernels.formats.formats import UNQUANTIZED
from qlora_compile.kernels.gpu.configs import dequantize_decoder
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.variants.base import (
    Config,
    LinearGradients,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    Variant,
    bias_gradient,
)
from qlora_compile.kernels.variants.cpu_cost import dense_seconds
from qlora_compile.kernels.variants.decoding import decode_reasons, dequantize_seconds
from qlora_compile.kernels.variants.native_adapter import (
    NativeAdapter,
    add_product,
    native_dtypes,
    row_blocks,
)
from qlora_compile.kernels.workspace import workspace
from qlora_compile.problem import Problem


@dataclass(frozen=True)
class DenseConfig(Config):
    """weight_block: about how many weights are decoded at a time, None for all of W. gemm_dtype:
    what W and x are multiplied in. merged: s B A is added to the decoded weight, so that the
    adapter costs N * K * rank instead of M * (N + K) * rank (RunLoRA, Cherniuk et al. 2023).
    decoder: of the Triton kernel that decodes W, None for torch's operators."""

    gemm_dtype: torch.dtype
    weight_block: int | None = None
    merged: bool = False
    decoder: str | None = None

    @property
    def label(self) -> str:
        block = "whole" if self.weight_block is None else f"{self.weight_block >> 10}k"
        parts = [block, str(self.gemm_dtype).removeprefix("torch.")]
        return " ".join([*parts, *(["merged"] * self.merged), *filter(None, [self.decoder])])


WEIGHT_BLOCKS = (1 << 19, 1 << 21)
"""Sizes to choose from on CPU: 2 and 8 MB of float32, for its caches. With 0.5 MB, starting the
operators for each block cost more than the smaller cache gains, at every shape measured."""

_MERGED_DTYPES = (torch.float32, torch.float64)
"""Those in which the sum of weight and adapter loses nothing of either: an adapter's share of a
weight is often smaller than what bfloat16 resolves."""


class Dense(Variant):
    name = "dense"

    def rejects(self, problem: Problem) -> list[str]:
        return []

    def configs(self, problem: Problem) -> Sequence[DenseConfig]:
        """The first is the standard one: all of W, in the problem's own dtype."""
        own = problem.compute_dtype
        if torch.device(problem.device).type != "cpu":
            target = target_of(problem.device)
            plain = DenseConfig(own)
            if target is None or decode_reasons(target, problem):
                return (plain,)
            return (replace(plain, decoder=dequantize_decoder(target, own)), plain)
        dtypes = native_dtypes(own)
        configs = []
        for dtype in dtypes:
            blocks = [None, *self._cuts(problem, dtype)]
            configs += [DenseConfig(dtype, block) for block in blocks]
            if self._merges(problem, dtype):
                configs += [DenseConfig(dtype, block, merged=True) for block in blocks]
        return configs

    def _cuts(self, problem: Problem, dtype: torch.dtype) -> list[int]:
        if problem.format == UNQUANTIZED:
            return []
        # The gradient of x is a sum over the blocks: in a narrower dtype it would be rounded after
        # each of them, or need a copy of x's size.
        if problem.direction == "backward" and (
            dtype not in _MERGED_DTYPES or problem.x_dtype != dtype
        ):
            return []
        return [block for block in WEIGHT_BLOCKS if 2 * block <= problem.n * problem.k]

    def _merges(self, problem: Problem, dtype: torch.dtype) -> bool:
        exact = dtype in _MERGED_DTYPES and problem.lora_dtype.itemsize <= dtype.itemsize
        return bool(exact and problem.rank and not problem.dropout)

    def cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        assert isinstance(config, DenseConfig)
        if isinstance(device, CpuModel):
            return dense_seconds(
                problem, device, config.gemm_dtype, config.weight_block, config.merged
            )
        m, n, k = problem.m, problem.n, problem.k
        total = device.gemm_seconds(m, n, k, device.vendor_efficiency) + LAUNCH_SECONDS
        if config.decoder is not None:
            total += dequantize_seconds(problem, device)
        elif problem.format != UNQUANTIZED:
            # torch's own operators: codes widened, looked up, scaled and rounded one after another.
            total += device.stream_seconds(n * k * 30) + 12 * LAUNCH_SECONDS
        if problem.rank:
            # The adapter reads x, or dY and x, and updates y or dX once more.
            moved, launches = k + 2 * n, 3
            if problem.direction == "backward":
                recomputed = not problem.keeps_low_rank
                moved, launches = 2 * n + (1 + recomputed) * k + 2 * k, 5 + recomputed
            total += device.stream_seconds(2 * m * moved) + launches * LAUNCH_SECONDS
        if problem.dropout:
            total += device.stream_seconds(m * k * 20) + 60 * LAUNCH_SECONDS
        return total

    def forward(self, tensors: LinearTensors, spec: LinearSpec, config: Config) -> Tensor:
        assert isinstance(config, DenseConfig)
        x, dtype = tensors.x, config.gemm_dtype
        bias = None if tensors.bias is None else tensors.bias.to(dtype)
        adapter = NativeAdapter.of(tensors, spec, dtype)
        low_rank = None
        if adapter is not None and (not config.merged or tensors.low_rank is not None):
            low_rank = adapter.low_rank(x)
            if tensors.low_rank is not None:
                tensors.low_rank.copy_(low_rank)
        y = x.new_empty(x.shape[0], spec.n, dtype=spec.out_dtype)
        merged = adapter if config.merged else None
        separate = None if config.merged else adapter
        plain = {x.dtype, spec.out_dtype, separate.dtype if separate else dtype} == {dtype}
        blocks = row_blocks(x, whole=plain)
        for n, weight in _weight_blocks(tensors.planes, spec, config, merged):
            for m in blocks:
                part = target = y[m, n]
                if y.dtype != dtype:
                    part = torch.empty_like(target, dtype=dtype)
                if bias is None:
                    torch.mm(x[m].to(dtype), weight.t(), out=part)
                else:
                    torch.addmm(bias[n], x[m].to(dtype), weight.t(), out=part)
                if separate is not None and low_rank is not None:
                    part = add_product(part, low_rank[m], separate.b[n].t())
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
        assert isinstance(config, DenseConfig)
        x, dtype = tensors.x, config.gemm_dtype
        adapter = NativeAdapter.of(tensors, spec, dtype)
        plain = {x.dtype, grad.dtype} == {dtype}
        blocks = row_blocks(x, whole=plain and (adapter is None or adapter.plain(x)))
        grad_x = weight = None
        if needs.x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            merged = adapter if config.merged else None
            passes = _weight_blocks(tensors.planes, spec, config, merged)
            if config.weight_block is None:
                ((_, weight),) = passes
            else:
                for n, block in passes:
                    for m in blocks:
                        beta = 0 if n.start == 0 else 1
                        part = grad[m, n].to(dtype)
                        torch.addmm(grad_x[m], part, block, beta=beta, out=grad_x[m])
        totals = None
        if adapter is not None and needs.adapter:
            totals = adapter.totals()
        for m in blocks:
            base_grad = grad[m].to(dtype)
            target = part = None
            if grad_x is not None:
                part = target = grad_x[m]
                if x.dtype != dtype:
                    part = torch.empty_like(target, dtype=dtype)
                if weight is not None:
                    torch.mm(base_grad, weight, out=part)
            if adapter is not None and (totals is not None or (needs.x and not config.merged)):
                adapter_grad = grad[m].to(adapter.dtype) if dtype != adapter.dtype else base_grad
                grad_low = (adapter_grad @ adapter.b).mul_(adapter.scaling)
                keep = adapter.keep(m)
                if totals is not None:
                    adapter.accumulate(totals, m, adapter_grad, grad_low, keep)
                if part is not None and not config.merged:
                    part = adapter.add_to_input_gradient(part, grad_low, keep)
            if target is not None and part is not None and part is not target:
                target.copy_(part)
        grad_bias = None
        if needs.bias and tensors.bias is not None:
            grad_bias = bias_gradient(grad, tensors.bias)
        grad_a, grad_b = (None, None) if adapter is None else adapter.gradients(totals)
        return LinearGradients(grad_x, grad_a, grad_b, grad_bias)


def _weight_blocks(
    planes: Sequence[Tensor], spec: LinearSpec, config: DenseConfig, merged: NativeAdapter | None
) -> Iterator[tuple[slice, Tensor]]:
    """What goes through the weight once: pairs (n, W[n] in the config's dtype, with the `merged`
    adapter added). A block is valid until the next one is taken."""
    dtype, device = config.gemm_dtype, planes[0].device
    if config.decoder is not None:
        from qlora_compile.kernels.gpu.products import dequantize

        blocks = iter([(slice(0, spec.n), dequantize(list(planes), spec, dtype, config.decoder))])
    else:
        rows = spec.n if config.weight_block is None else config.weight_block // spec.k
        blocks = spec.decoded(
            planes, dtype, rows, lambda rows: workspace(rows, spec.k, dtype=dtype, device=device)
        )
    for n, block in blocks:
        if merged is not None:
            # An unquantised weight is the model's own.
            out = None if block.data_ptr() == planes[0].data_ptr() else block
            left, right = merged.b[n].to(dtype), merged.a.to(dtype)
            block = torch.addmm(block, left, right, alpha=merged.scaling, out=out)
        yield n, block
