"""torchao's tensors of integers: Int8Tensor and IntxUnpackedToInt8Tensor, version 0.18."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.packings.integers import packed_integers
from qlora_compile.kernels.packed import PackedWeight


def packed(tensors: Mapping[str, Tensor], block: tuple[int, int], bits: int) -> PackedWeight:
    """Return the weight [N, K] whose values are (code - zero) * scale.

    tensors: "codes", int8 [N, K], of `bits` bits; "scales" and, unless all are 0, "zeros", integers
    or floats, one for each block of so many rows and columns. Raises StoredWeightError.
    """
    middle = 2 ** (bits - 1)
    rows, group_size = block
    codes = tensors["codes"].to(torch.int16) + middle
    if not bool(((codes >= 0) & (codes < 2 * middle)).all()):
        problem = f"its values are not integers of {bits} bits"
        raise StoredWeightError(tensor="codes", problem=problem, remedy="download the file again")
    scales = tensors["scales"].repeat_interleave(rows, dim=0)
    zeros: Any = tensors.get("zeros")
    if zeros is None or not bool(zeros.any()):
        zeros = middle
    else:
        wide = torch.float32 if zeros.is_floating_point() else torch.int16
        raised = zeros.to(wide) + middle
        if not torch.equal(raised - middle, zeros.to(wide)):
            problem = f"zero points plus {middle} are not exact in float32"
            raise StoredWeightError(tensor="zeros", problem=problem, remedy="use integer zeros")
        zeros = raised.repeat_interleave(rows, dim=0)
    return packed_integers(codes.to(torch.uint8), bits, scales, zeros, group_size=group_size)


def packed_tensor(weight: Any) -> PackedWeight:
    """Return the weight that a torchao tensor stores, ignoring its settings for activations. Raises
    StoredWeightError."""
    tensors = {"codes": weight.qdata, "scales": weight.scale}
    if weight.zero_point is not None:
        tensors["zeros"] = weight.zero_point
    return packed(tensors, tuple(weight.block_size), _bits(weight))


def format_name(weight: Any) -> str:
    """Return the name of the format that holds a tensor of torchao."""
    return "int4" if _bits(weight) <= 4 else "uint8"


def _bits(weight: Any) -> int:
    target = str(getattr(weight, "target_dtype", torch.int8))
    return int(target.removeprefix("torch.int"))
