"""grouped: one Triton product for all experts, W decoded in its loop; the host never waits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.experts.base import (
    ExpertsProblem,
    ExpertsSpec,
    ExpertsTensors,
    ExpertsVariant,
)
from qlora_compile.kernels.formats.formats import format_named, format_of
from qlora_compile.kernels.formats.groups import GroupFormat
from qlora_compile.kernels.gpu.configs import (
    FUSED_UTILIZATION,
    GROUPED,
    GROUPED_DENSE,
    TAIL_UTILIZATION,
    GemmConfig,
    adapter_width,
)
from qlora_compile.kernels.gpu.target import target_of, tuned_target, why_no_target
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.variants.base import LinearGradients
from qlora_compile.kernels.variants.decoding import decoder_names

_TALLEST = {"sm_80": 64, "sm_89": 64}
"""The most rows of a tile with which decoders of 8-bit codes and of groups do not spill registers,
for targets with a limit."""

_UTILIZATION = FUSED_UTILIZATION | {"sm_90": 0.5}
"""Like `FUSED_UTILIZATION`; on sm_90 these kernels' registers leave room for one CTA."""

_ROWS_DECODING_COSTS = 64
"""Decoding a weight takes about as long as the products of so many rows with it."""


def grouped_config(target: str, rows: int, experts: int, rank: int, layout: Layout) -> GemmConfig:
    """Return the config for `rows` of all experts together, as the host does not know whose rows
    they are. target: one that `tuned_target` knows."""
    tuned = tuned_target(target)
    assert tuned is not None
    quant_format = format_of(layout)
    eight = quant_format is not None and quant_format.bits == 8
    limited = eight or isinstance(quant_format, GroupFormat)
    tallest = _TALLEST.get(tuned, 128) if limited else 128
    width = adapter_width(rank, torch.bfloat16, torch.bfloat16)
    configs = [
        config
        for config in (GROUPED if layout.quantized else GROUPED_DENSE)[tuned]
        if width <= config.largest_width and config.block_m <= tallest
    ]
    average = -(-rows // max(min(rows, experts), 1))
    config = next((config for config in configs if config.block_m >= average), configs[-1])
    if quant_format is None or config.decoder in decoder_names(layout, target, torch.bfloat16):
        return config
    # A format without this decoder has one that runs on every target.
    return replace(config, decoder=quant_format.device_decoders()[0].name)


def grouped_cost(problem: ExpertsProblem, config: GemmConfig, device: DeviceModel) -> float:
    """Return modelled seconds of one launch for all experts, with rows spread evenly over them."""
    active, tiles = _tiles(problem, config.block_m)
    n, k = problem.n, problem.k
    packed = problem.layout.quantized
    height = max(config.block_m, _ROWS_DECODING_COSTS if packed else 16)
    utilization = _UTILIZATION[device.target] if packed else TAIL_UTILIZATION
    compute = 2 * tiles * height * n * k / (device.flops * device.vendor_efficiency * utilization)
    columns = n if problem.direction == "forward" else k
    filled = min(1.0, tiles * -(-columns // config.block_c) / device.sms)
    moved = active * n * k * _weight_bytes(problem) + 2 * problem.m * (n + k)
    seconds = max(compute, device.stream_seconds(moved) / filled) + LAUNCH_SECONDS
    return seconds + adapter_seconds(problem, device)


def _tiles(problem: ExpertsProblem, block_m: int) -> tuple[int, int]:
    """Return (experts with rows, tiles of rows)."""
    active = max(min(problem.experts, problem.m), 1)
    return active, active * -(-problem.m // (active * block_m))


def _weight_bytes(problem: ExpertsProblem) -> float:
    """Return the bytes of one weight, including its part of the scales."""
    if not problem.layout.quantized:
        return 2
    return format_named(problem.layout.format).bytes_per_weight(problem.layout)


def adapter_seconds(problem: ExpertsProblem, device: DeviceModel) -> float:
    """Return the seconds of the thin products: each reads a tall operand once, and all factors."""
    if not problem.rank:
        return 0.0
    x, y = 2 * problem.m * problem.k, 2 * problem.m * problem.n
    factors = 4 * problem.experts * problem.rank * (problem.n + problem.k)
    if problem.direction == "forward":
        return device.stream_seconds(x + factors) + LAUNCH_SECONDS
    return device.stream_seconds(2 * x + 2 * y + 3 * factors) + 4 * LAUNCH_SECONDS


class GroupedExperts(ExpertsVariant):
    name = "grouped"

    def rejects(self, problem: ExpertsProblem) -> list[str]:
        target = target_of(problem.device)
        if target is None:
            return [why_no_target(problem.device)]
        reasons = []
        if tuned_target(target) is None:
            reasons.append(f"{target} has no tensor cores for bfloat16")
        for role, dtype in (("product", problem.compute_dtype), ("output", problem.out_dtype)):
            if dtype not in (torch.bfloat16, torch.float16):
                reasons.append(f"the {role} is in {dtype}, not bfloat16 or float16")
        if problem.x_dtype == torch.float64:
            reasons.append(f"x is in {problem.x_dtype}")
        quant_format = format_of(problem.layout)
        if quant_format is not None:
            if problem.k % 8:
                reasons.append(f"K = {problem.k} is not a multiple of 8")
            if (obstacle := quant_format.device_obstacle(problem.layout)) is not None:
                reasons.append(obstacle)
        return reasons

    def cost(self, problem: ExpertsProblem, device: DeviceModel) -> float:
        config = grouped_config(
            device.target, problem.m, problem.experts, problem.rank, problem.layout
        )
        return grouped_cost(problem, config, device)

    def forward(self, tensors: ExpertsTensors, spec: ExpertsSpec) -> Tensor:
        from qlora_compile.kernels.gpu.grouped_launch import grouped_forward

        return grouped_forward(tensors, spec, _config(tensors, spec))

    def backward(
        self, grad: Tensor, tensors: ExpertsTensors, spec: ExpertsSpec, needs: NeedsGradient
    ) -> LinearGradients:
        from qlora_compile.kernels.gpu.grouped_launch import grouped_backward

        return grouped_backward(grad, tensors, spec, _config(tensors, spec), needs)


def _config(tensors: ExpertsTensors, spec: ExpertsSpec) -> GemmConfig:
    target = target_of(str(tensors.x.device))
    assert target is not None
    rank = 0 if tensors.lora_a is None else tensors.lora_a.shape[1]
    return grouped_config(target, tensors.x.shape[0], spec.experts, rank, spec.layout)
