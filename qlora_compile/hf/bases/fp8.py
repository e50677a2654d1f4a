"""transformers' FP8Linear: 8-bit floats with a scale for each block of 128 × 128."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from qlora_compile.hf.bases.base import RepackedBase
from qlora_compile.hf.packings.fp8 import FORMATS, packed_fp8
from qlora_compile.kernels.packed import PackedWeight


class Fp8Linear(RepackedBase):
    """Products with the packed weight do not quantise their inputs, as those of FP8Linear do."""

    library: ClassVar[str] = "transformers FP8"

    def recognises(self, module: nn.Module) -> bool:
        kind = type(module)
        return kind.__name__ == "FP8Linear" and kind.__module__.startswith("transformers.")

    def format(self, module: Any) -> str | None:
        quant_format = FORMATS.get(module.weight.dtype)
        return None if quant_format is None else quant_format.name

    def obstacle(self, module: Any) -> str | None:
        if module.weight.dtype not in FORMATS:
            return f"its weight is stored as {module.weight.dtype}, no float of 8 bits"
        return None

    def packed(self, module: Any) -> PackedWeight:
        block = module.block_size
        sizes = None if block is None else (block[0], block[1])
        return packed_fp8(module.weight.data, module.weight_scale_inv.data, sizes)

    def dtype(self, module: Any) -> torch.dtype:
        """Return the bias's dtype; without a bias bfloat16, the dtype that FP8Linear dequantises
        to."""
        return torch.bfloat16 if module.bias is None else module.bias.dtype
