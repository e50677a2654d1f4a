"""dense: dequantise the weight, multiply with the vendor GEMM, add the adapter by addmm.

Native torch ops only, so it runs on every device; the baseline for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.stores import read_by
from qlora_compile.kernels.device_model import LAUNCH_SECONDS, CpuModel, DeviceModel
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.adapter_sum import add_product, adds_in_place
from qlora_compile.kernels.variants.base import (
    Config,
    Group,
    Linear,
    LinearGradients,
    LinearSpec,
    NeedsGradient,
    Variant,
    bias_gradient,
)
from qlora_compile.kernels.variants.cpu_cost import dense_seconds
from qlora_compile.kernels.variants.decoding import (
    decode_reasons,
    dequantize_decoder,
    dequantize_seconds,
)
from qlora_compile.kernels.variants.native_adapter import (
    NativeAdapter,
    NativeAdapters,
    NativeGradients,
    cut,
    native_dtypes,
    row_blocks,
)
from qlora_compile.kernels.workspace import workspace


@dataclass(frozen=True)
class DenseConfig(Config):
    """Settings of *dense*. weight_block: about how many weights are decoded at a time, None for all
    of W. gemm_dtype: the dtype in which W and x are multiplied. merged: whether s B A is added to
    the decoded weight, so that the adapter costs N * K * rank instead of M * (N + K) * rank
    (RunLoRA, Cherniuk et al. 2023). decoder: the one of the Triton kernel that decodes W, None for
    torch's operators."""

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
operators for each block cost more than the closer cache gained, at every shape measured."""

_MERGED_DTYPES = (torch.float32, torch.float64)
"""The dtypes in which the sum of weight and adapter loses nothing: an adapter's share of a weight
is often smaller than what bfloat16 resolves."""


class Dense(Variant):
    name = "dense"

    def rejects(self, problem: Problem) -> list[str]:
        return []

    def configs(self, problem: Problem) -> Sequence[DenseConfig]:
        """Return the configs, first the standard one: all of W, in the problem's own dtype."""
        own = problem.compute_dtype
        if torch.device(problem.device).type != "cpu":
            target = target_of(problem.device)
            plain = DenseConfig(own)
            if target is None or decode_reasons(target, problem):
                return (plain,)
            return (replace(plain, decoder=dequantize_decoder(problem.layout, target, own)), plain)
        dtypes = native_dtypes(own)
        configs = []
        for dtype in dtypes:
            blocks = [None, *self._cuts(problem, dtype)]
            configs += [DenseConfig(dtype, block) for block in blocks]
            if self._merges(problem, dtype):
                configs += [DenseConfig(dtype, block, merged=True) for block in blocks]
        return configs

    def _cuts(self, problem: Problem, dtype: torch.dtype) -> list[int]:
        # A 16-bit product takes up to ten times as long if it writes some columns of a wide y, and
        # decoding to 16 bits is so fast that blocks gain 2 % at most.
        if not problem.layout.quantized or dtype not in _MERGED_DTYPES:
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
        elif problem.layout.quantized:
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

    def forward_group(self, group: Group, config: Config) -> list[Tensor]:
        assert isinstance(config, DenseConfig)
        adapters = NativeAdapters.of(group, config.gemm_dtype)
        lows: dict[int, Tensor] = {}
        if adapters is not None:
            saves = any(tensors.low_rank is not None for tensors, _ in group)
            if saves or not config.merged:
                lows = adapters.low_ranks()
        x, dtype = group[0][0].x, config.gemm_dtype
        results = [x.new_empty(x.shape[0], spec.n, dtype=spec.out_dtype) for _, spec in group]
        whole = {x.dtype, group[0][1].out_dtype} == {dtype}
        if adapters is not None and not config.merged:
            whole = whole and adds_in_place(dtype, adapters.dtype)
        for positions, blocks in _parts(group, config, row_blocks(x, whole=whole)):
            rows = _Rows(x, blocks, dtype)
            for position in positions:
                adapter = None if adapters is None else adapters.members.get(position)
                low, y = lows.get(position), results[position]
                self._forward(rows, group[position], config, adapter, low, y)
        return results

    def _forward(
        self,
        rows: _Rows,
        linear: Linear,
        config: DenseConfig,
        adapter: NativeAdapter | None,
        low: Tensor | None,
        y: Tensor,
    ) -> None:
        """Write `rows` of y of one Linear. low: S of its adapter, unless the adapter is merged."""
        (tensors, spec), dtype = linear, config.gemm_dtype
        bias = None if tensors.bias is None else tensors.bias.to(dtype)
        merged, separate = (adapter, None) if config.merged else (None, adapter)
        weights = _weight_blocks(tensors.planes, spec, config, merged, len(rows.matrix))
        for n, weight in weights:
            for m in rows.blocks:
                part = target = cut(y, m, n)
                if y.dtype != dtype:
                    part = torch.empty_like(target, dtype=dtype)
                if bias is None:
                    torch.mm(rows.of(m), weight.t(), out=part)
                else:
                    torch.addmm(bias[n], rows.of(m), weight.t(), out=part)
                if separate is not None and low is not None:
                    part = add_product(part, cut(low, m), cut(separate.b, n).t())
                if part is not target:
                    target.copy_(part)

    def backward_group(
        self, grads: Sequence[Tensor], group: Group, needs: NeedsGradient, config: Config
    ) -> tuple[Tensor | None, list[LinearGradients]]:
        assert isinstance(config, DenseConfig)
        x, dtype = group[0][0].x, config.gemm_dtype
        adapters = NativeAdapters.of(group, dtype)
        grad_x = self._input_gradient(grads, group, config, adapters) if needs.x else None
        others = [
            LinearGradients(bias=bias_gradient(grad, tensors.bias, needs))
            for grad, (tensors, _) in zip(grads, group, strict=True)
        ]
        # A merged adapter's share of dX is in the weight.
        adds = needs.x and not config.merged
        if adapters is not None and (needs.adapter or adds):
            work = NativeGradients(adapters, replace(needs, x=adds))
            for position in adapters.members:
                grad = grads[position]
                plain = {x.dtype, grad.dtype, adapters.dtype} == {dtype}
                for m in row_blocks(x, whole=plain or adapters.is_thin(grad)):
                    work.take(position, m, cut(grad, m))
            work.finish(grad_x)
            for position in adapters.members:
                grad_a, grad_b = work.of(position)
                others[position] = replace(others[position], lora_a=grad_a, lora_b=grad_b)
        return grad_x, others

    def _input_gradient(
        self,
        grads: Sequence[Tensor],
        group: Group,
        config: DenseConfig,
        adapters: NativeAdapters | None,
    ) -> Tensor:
        """Return the weights' part of the gradient of x, [M, K]."""
        x, dtype = group[0][0].x, config.gemm_dtype
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        dtypes = {x.dtype, *(grad.dtype for grad in grads)}
        first = True
        for positions, blocks in _parts(group, config, row_blocks(x, whole=dtypes == {dtype})):
            total = grad_x
            if len(blocks) == 1:
                total, first = cut(grad_x, *blocks), True
                if dtype.itemsize > x.dtype.itemsize:
                    total = torch.empty_like(total, dtype=dtype)
            for position in positions:
                tensors, spec = group[position]
                merged = adapters.members.get(position) if adapters and config.merged else None
                rows = _Rows(grads[position], blocks, dtype)
                weights = _weight_blocks(tensors.planes, spec, config, merged, len(x))
                for n, weight in weights:
                    for m in blocks:
                        part = cut(rows.of(m), slice(0, m.stop - m.start), n)
                        target = total if len(blocks) == 1 else cut(total, m)
                        _add_input_gradient(target, part, weight, first=first)
                    first = False
            if total.dtype != x.dtype:
                cut(grad_x, *blocks).copy_(total)
        return grad_x


class _Rows:
    """Rows of a matrix in `blocks` and in `dtype`; a single block is converted once."""

    def __init__(self, matrix: Tensor, blocks: Sequence[slice], dtype: torch.dtype) -> None:
        self.matrix, self.blocks, self.dtype = matrix, blocks, dtype
        self._only = cut(matrix, *blocks).to(dtype) if len(blocks) == 1 else None

    def of(self, block: slice) -> Tensor:
        return cut(self.matrix, block).to(self.dtype) if self._only is None else self._only


def _parts(
    group: Group, config: DenseConfig, blocks: Sequence[slice]
) -> list[tuple[Sequence[int], Sequence[slice]]]:
    """The work in parts, each of some of the group's Linears and some `blocks` of rows.

    A weight that is decoded in blocks is decoded for each block of rows, for which siblings then
    convert x, and add their gradients, once; a weight that is decoded whole is decoded once.
    """
    positions = range(len(group))
    if len(blocks) == 1 or config.weight_block is not None:
        return [(positions, [m]) for m in blocks]
    return [([position], blocks) for position in positions]


def _add_input_gradient(total: Tensor, grad: Tensor, weight: Tensor, *, first: bool) -> None:
    """Add grad @ weight to total, or write it."""
    if total.dtype != grad.dtype:
        product = grad @ weight
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(grad, weight, out=total)
    else:
        total.addmm_(grad, weight)


def _weight_blocks(
    planes: Sequence[Tensor],
    spec: LinearSpec,
    config: DenseConfig,
    merged: NativeAdapter | None,
    m: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield pairs (n, W[n] in the config's dtype, with the `merged` adapter added) that go through
    the weight once. A block is valid until the next one is taken. m: the rows of the products."""
    dtype, device = config.gemm_dtype, planes[0].device
    if config.decoder is not None:
        from qlora_compile.kernels.gpu.products import dequantize

        blocks = iter([(slice(0, spec.n), dequantize(planes, spec, dtype, config.decoder))])
    else:
        rows = spec.n if config.weight_block is None else config.weight_block // spec.k
        blocks = spec.decoded(
            planes, dtype, rows, lambda rows: workspace(rows, spec.k, dtype=dtype, device=device)
        )
    for n, block in read_by(m, blocks):
        if merged is not None:
            # An unquantised weight is the model's own.
            out = None if block.data_ptr() == planes[0].data_ptr() else block
            left, right = merged.b[n].to(dtype) * merged.scaling, merged.a.to(dtype)
            block = torch.addmm(block, left, right, out=out)
        yield n, block
