"""Decoding a packed weight by Triton: what it needs, and what it costs."""

from __future__ import annotations

import torch

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.formats.formats import UNQUANTIZED, format_named
from qlora_compile.kernels.gpu.target import tuned_target
from qlora_compile.kernels.problem import Problem

NOT_PACKED = "the weight is not packed"

_LARGEST_BLOCK_COUNT = 2**31


def decode_reasons(target: str, problem: Problem) -> list[str]:
    """Why Triton cannot decode the weight of `problem` on `target`."""
    reasons = []
    if tuned_target(target) is None:
        reasons.append(f"{target} has no tensor cores for bfloat16")
    if problem.k % 8:
        reasons.append(f"K = {problem.k} is not a multiple of 8")
    if problem.compute_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"{problem.compute_dtype} products are left to the vendor's GEMM")
    if problem.format == UNQUANTIZED:
        reasons.append(NOT_PACKED)
    else:
        blocks = problem.n * problem.k // problem.block_size
        if blocks >= _LARGEST_BLOCK_COUNT:
            reasons.append(f"{blocks} blocks of absmax, more than {_LARGEST_BLOCK_COUNT - 1}")
    return reasons


def packed_bytes(problem: Problem) -> float:
    """Of W's codes and absmax, the latter taken for float32."""
    bits = format_named(problem.format).bits
    return problem.n * problem.k * (bits / 8 + 4 / problem.block_size)


def dequantize_seconds(problem: Problem, device: DeviceModel) -> float:
    """Modelled, of decoding W to memory once; nothing where it is not packed."""
    if problem.format == UNQUANTIZED:
        return 0.0
    moved = packed_bytes(problem) + problem.compute_dtype.itemsize * problem.n * problem.k
    return device.stream_seconds(moved) + LAUNCH_SECONDS
