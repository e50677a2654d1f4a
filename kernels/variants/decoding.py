"""Decoding of a packed weight by Triton: its conditions and its cost."""

from __future__ import annotations

import torch

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.formats.formats import format_named, format_of
from qlora_compile.kernels.gpu.target import tuned_target
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.problem import Problem

NOT_PACKED = "the weight is not packed"


def decode_reasons(target: str, problem: Problem) -> list[str]:
    """Return why Triton cannot decode the weight of `problem` on `target`."""
    reasons = []
    if tuned_target(target) is None:
        reasons.append(f"{target} has no tensor cores for bfloat16")
    if problem.k % 8:
        reasons.append(f"K = {problem.k} is not a multiple of 8")
    if problem.compute_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"{problem.compute_dtype} products are left to the vendor's GEMM")
    quant_format = format_of(problem.layout)
    obstacle = NOT_PACKED if quant_format is None else quant_format.device_obstacle(problem.layout)
    return reasons if obstacle is None else [*reasons, obstacle]


def decoder_names(layout: Layout, target: str, dtype: torch.dtype) -> list[str]:
    """Return which decoders of the format give `dtype` on `target`. Imports Triton."""
    decoders = format_named(layout.format).device_decoders()
    return [decoder.name for decoder in decoders if not decoder.rejects(target, dtype, layout)]


def decoder_rejections(layout: Layout, target: str, dtype: torch.dtype) -> list[str]:
    """Return why other decoders of the format do not give `dtype` on `target`. Imports Triton."""
    decoders = format_named(layout.format).device_decoders()
    return [reason for each in decoders for reason in each.rejects(target, dtype, layout)]


def dequantize_decoder(layout: Layout, target: str | None, dtype: torch.dtype) -> str:
    """Return the decoder for the standalone dequantisation to `dtype`.

    target: None in Triton's interpreter, which has no device.
    """
    first = format_named(layout.format).device_decoders()[0].name
    names = [] if target is None else decoder_names(layout, target, dtype)
    return _DEQUANTIZES if _DEQUANTIZES in names else first


_DEQUANTIZES = "prmt"
"""The decoder that writes decoded weights to memory fastest, in formats that have it."""


def packed_bytes(problem: Problem) -> float:
    """Return how many bytes of the packed W a product reads."""
    bytes_each = format_named(problem.layout.format).bytes_per_weight(problem.layout)
    return problem.n * problem.k * bytes_each


def dequantize_seconds(problem: Problem, device: DeviceModel) -> float:
    """Return modelled seconds of decoding W to memory once; 0 if W is not packed."""
    if not problem.layout.quantized:
        return 0.0
    moved = packed_bytes(problem) + problem.compute_dtype.itemsize * problem.n * problem.k
    return device.stream_seconds(moved) + LAUNCH_SECONDS
