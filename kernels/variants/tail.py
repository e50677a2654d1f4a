"""tail: W is decoded to memory, then multiplied by a Triton GEMM that starts at the adapter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.gpu.configs import TAIL, TAIL_UTILIZATION, GemmConfig
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import Config, LinearSpec, LinearTensors
from qlora_compile.kernels.variants.decoding import dequantize_decoder, dequantize_seconds
from qlora_compile.kernels.variants.gemm_variant import GemmVariant


class Tail(GemmVariant):
    name = "tail"
    takes_unquantized = True

    def shipped(self, target: str) -> Sequence[GemmConfig]:
        return TAIL[target]

    def weight(self, tensors: LinearTensors, spec: LinearSpec) -> Sequence[Tensor]:
        from qlora_compile.kernels.gpu.launch import with_contiguous_rows
        from qlora_compile.kernels.gpu.products import dequantize

        dtype = spec.compute_dtype
        if not spec.layout.quantized:
            return [with_contiguous_rows(tensors.planes[0].to(dtype))]
        decoder = dequantize_decoder(spec.layout, target_of(str(tensors.x.device)), dtype)
        return [dequantize(tensors.planes, spec, dtype, decoder)]

    def cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        assert isinstance(config, GemmConfig)
        padded = -(-problem.m // config.block_m) * config.block_m
        efficiency = device.vendor_efficiency * TAIL_UTILIZATION
        gemm = device.gemm_seconds(padded, problem.n, problem.k, efficiency)
        return (
            gemm
            + LAUNCH_SECONDS
            + dequantize_seconds(problem, device)
            + self.adapter_cost(problem, device)
        )
