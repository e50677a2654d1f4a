"""fused: W is decoded in the GEMM's loop and never written to memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.gpu.configs import FUSED, FUSED_UTILIZATION, SKINNY, GemmConfig
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import Config, LinearSpec, LinearTensors
from qlora_compile.kernels.variants.decoding import packed_bytes
from qlora_compile.kernels.variants.gemm_variant import GemmVariant


class Fused(GemmVariant):
    name = "fused"

    def shipped(self, target: str) -> Sequence[GemmConfig]:
        return FUSED[target]

    def weight(self, tensors: LinearTensors, spec: LinearSpec) -> Sequence[Tensor]:
        return tensors.planes

    def cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        assert isinstance(config, GemmConfig)
        m, n, k = problem.m, problem.n, problem.k
        # A tile computes its padding too.
        padded = -(-m // config.block_m) * config.block_m
        efficiency = device.vendor_efficiency * FUSED_UTILIZATION[device.target]
        compute = 2 * padded * n * k / (device.flops * efficiency)
        return (
            max(compute, self.moving_seconds(problem, config, device))
            + LAUNCH_SECONDS
            + self.adapter_cost(problem, device)
        )

    def moving_seconds(self, problem: Problem, config: GemmConfig, device: DeviceModel) -> float:
        """Return the seconds of moving W, x and y through memory."""
        m, n, k = problem.m, problem.n, problem.k
        columns = n if problem.direction == "forward" else k
        programs = -(-m // config.block_m) * -(-columns // config.block_c) * config.splits
        # Fewer programs than multiprocessors ask for that much less of the memory's bandwidth.
        filled = min(1.0, programs / device.sms)
        seconds = device.stream_seconds(packed_bytes(problem) + 2 * m * (n + k)) / filled
        if config.splits > 1:
            # Partial sums in float32 are written, read and added up.
            seconds += device.stream_seconds(8 * m * columns * config.splits) + LAUNCH_SECONDS
        return seconds


class Skinny(Fused):
    """fused for few rows: tiles of sixteen rows of x, and programs that share a reduction."""

    name = "skinny"

    def shipped(self, target: str) -> Sequence[GemmConfig]:
        return SKINNY[target]

    def rejects_on(self, target: str, problem: Problem) -> list[str]:
        reasons = super().rejects_on(target, problem)
        if problem.m > 16:
            reasons.append(f"{problem.m} rows, more than 16")
        return reasons
