"""compressed-tensors' floats: "float-quantized", "nvfp4-pack-quantized" and "mxfp4-pack-quantized",
version 0.20."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.packings.fp4 import packed_mxfp4, packed_nvfp4
from qlora_compile.hf.packings.fp8 import packed_fp8
from qlora_compile.kernels.formats.microscaling import MXFP4, NVFP4, E2m1Format
from qlora_compile.kernels.packed import PackedWeight

Arguments = Mapping[str, Any]
"""The `weights` of a config group, or of a module's scheme."""


def format_of_4_bits(arguments: Arguments) -> E2m1Format:
    """Return the format of weights of which 16 or 32 share a scale. Raises StoredWeightError."""
    size = arguments.get("group_size")
    for each in (NVFP4, MXFP4):
        if size == each.size:
            return each
    raise _unreadable(f"group_size is {size!r}, not {NVFP4.size} or {MXFP4.size}")


def block_of(arguments: Arguments) -> tuple[int, int] | None:
    """Return how many rows and columns of an 8-bit weight share a scale; None for a scale per
    tensor or row. Raises StoredWeightError."""
    strategy = arguments.get("strategy")
    if strategy not in ("block", "group"):
        return None
    try:
        sizes = (
            arguments["block_structure"] if strategy == "block" else (1, arguments["group_size"])
        )
        high, wide = map(int, sizes)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"the strategy is {strategy}, but its sizes cannot be read ({error!r})"
        raise _unreadable(problem) from error
    if high < 1 or wide < 1:
        raise _unreadable(f"the strategy is {strategy} with sizes {high} and {wide}")
    return high, wide


def packed(tensors: Mapping[str, Tensor], arguments: Arguments) -> PackedWeight:
    """Make a PackedWeight [N, K] of the tensors of a weight, sharing the memory of its codes.

    tensors: "codes", float8 [N, K] or uint8 [N, K / 2]; "scales"; for NVFP4 "global_scale", by
    which scales are divided (our format multiplies by the reciprocal). Raises StoredWeightError.
    """
    codes, scales = tensors["codes"], tensors["scales"]
    if codes.dtype != torch.uint8:
        return packed_fp8(codes, scales, block_of(arguments))
    if format_of_4_bits(arguments) is MXFP4:
        return packed_mxfp4(codes, scales)
    whole = tensors["global_scale"]
    if not bool((whole.isfinite() & (whole > 0)).all()):
        raise StoredWeightError(
            tensor="global_scale",
            problem=f"the global scale is {whole.tolist()}, not a finite number above 0",
            remedy="download the file again",
        )
    return packed_nvfp4(codes, scales, whole.reciprocal())


def _unreadable(problem: str) -> StoredWeightError:
    remedy = "download config.json again, or save the model dequantised by compressed-tensors"
    return StoredWeightError(tensor="quantization_config", problem=problem, remedy=remedy)
