"""compressed-tensors' Linears of integers: "pack-quantized" and "int-quantized"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.bases.compressed import CompressedBase
from qlora_compile.hf.packings import pack_quantized
from qlora_compile.kernels.packed import PackedWeight

_NAMES = {"scales": "weight_scale", "zeros": "weight_zero_point", "index": "weight_g_idx"}


class CompressedIntegers(CompressedBase):
    def recognises(self, module: nn.Module) -> bool:
        scheme: Any = getattr(module, "quantization_scheme", None)
        weights = getattr(scheme, "weights", None)
        stored = getattr(module, "weight_packed", getattr(module, "weight", None))
        return (
            isinstance(module, nn.Linear)
            and isinstance(stored, Tensor)
            and not stored.is_floating_point()
            and getattr(weights, "type", None) == "int"
        )

    def format(self, module: Any) -> str | None:
        return "int4" if module.quantization_scheme.weights.num_bits <= 4 else "uint8"

    def obstacle(self, module: Any) -> str | None:
        try:
            self._scheme(module)
        except StoredWeightError as error:
            return str(error)
        return None

    def _scheme(self, module: Any) -> pack_quantized.IntegerScheme:
        return pack_quantized.IntegerScheme.read(module.quantization_scheme.weights.model_dump())

    def packed(self, module: Any) -> PackedWeight:
        found = {role: getattr(module, name, None) for role, name in _NAMES.items()}
        tensors = {role: each.data for role, each in found.items() if each is not None}
        tensors["codes"] = self.weight(module).data
        shape = (module.out_features, module.in_features)
        return pack_quantized.packed(tensors, shape, self._scheme(module))

    def dtype(self, module: Any) -> torch.dtype:
        return module.weight_scale.dtype
