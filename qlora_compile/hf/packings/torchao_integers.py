"""torchao's tensors of integers: Int8Tensor and IntxUnpackedToInt8Tensor, version 0.18."""

from __future__ import annotations

from typing import Any

import torch

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.packings.integers import packed_integers
from qlora_compile.kernels.packed import PackedWeight


def packed(weight: Any) -> PackedWeight:
    """Return the weight [N, K] that a tensor of torchao stores.

    Its codes are `qdata`, int8 [N, K]; a block of `block_size` shares a `scale` and a `zero_point`,
    and a value is (code - zero_point) * scale. What a tensor says of activations is not looked at.
    Raises StoredWeightError.
    """
    bits = _bits(weight)
    middle = 2 ** (bits - 1)
    block_rows, group_size = weight.block_size
    codes = (weight.qdata.to(torch.int16) + middle).to(torch.uint8)
    scales = weight.scale.repeat_interleave(block_rows, dim=0)
    zeros: Any = weight.zero_point
    if zeros is None or not bool(zeros.any()):
        zeros = middle
    else:
        wide = torch.float32 if zeros.is_floating_point() else torch.int16
        raised = zeros.to(wide) + middle
        if not torch.equal(raised - middle, zeros.to(wide)):
            problem = f"zero points less {middle} are no float32"
            raise StoredWeightError(tensor="zeros", problem=problem, remedy="use integer ones")
        zeros = raised.repeat_interleave(block_rows, dim=0)
    return packed_integers(codes, bits, scales, zeros, group_size=group_size)


def format_name(weight: Any) -> str:
    """Return the name of the format that holds a tensor of torchao."""
    return "int4" if _bits(weight) <= 4 else "uint8"


def _bits(weight: Any) -> int:
    target = str(getattr(weight, "target_dtype", torch.int8))
    return int(target.removeprefix("torch.int"))
