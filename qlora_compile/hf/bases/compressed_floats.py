"""compressed-tensors' Linears of floats: FP8, NVFP4 and MXFP4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.hf.bases.compressed import CompressedBase
from qlora_compile.hf.packings import compressed_floats
from qlora_compile.hf.packings.fp8 import FORMATS
from qlora_compile.kernels.packed import PackedWeight


class CompressedFloats(CompressedBase):
    def recognises(self, module: nn.Module) -> bool:
        scheme: Any = getattr(module, "quantization_scheme", None)
        weights = getattr(scheme, "weights", None)
        stored = getattr(module, "weight_packed", getattr(module, "weight", None))
        return (
            isinstance(module, nn.Linear)
            and isinstance(stored, Tensor)
            and stored.dtype in (torch.uint8, *FORMATS)
            and getattr(weights, "type", None) == "float"
        )

    def format(self, module: Any) -> str | None:
        stored = self.weight(module)
        if stored.dtype in FORMATS:
            return FORMATS[stored.dtype].name
        return compressed_floats.format_of_4_bits(_arguments(module)).name

    def obstacle(self, module: Any) -> str | None:
        return None

    def packed(self, module: Any) -> PackedWeight:
        tensors = {"codes": self.weight(module).data, "scales": module.weight_scale.data}
        if hasattr(module, "weight_global_scale"):
            tensors["global_scale"] = module.weight_global_scale.data
        return compressed_floats.packed(tensors, _arguments(module))

    def dtype(self, module: Any) -> torch.dtype:
        scales = module.weight_scale.dtype
        return scales if scales.itemsize == 2 else torch.bfloat16


def _arguments(module: Any) -> dict[str, Any]:
    return module.quantization_scheme.weights.model_dump()
