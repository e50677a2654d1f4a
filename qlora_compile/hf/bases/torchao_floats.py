"""Linears whose weight is a Float8Tensor or an NF4Tensor of torchao, version 0.18."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from qlora_compile.hf.bases.base import RepackedBase
from qlora_compile.hf.packings.fp8 import FORMATS
from qlora_compile.hf.packings.torchao_floats import packed_float8, packed_nf4
from qlora_compile.kernels.formats.nf4 import NF4
from qlora_compile.kernels.packed import PackedWeight

_FLOAT8, _NF4 = "Float8Tensor", "NF4Tensor"


class TorchaoFloats(RepackedBase):
    """Products with the packed weight do not quantise their inputs, as some of torchao's do."""

    library: ClassVar[str] = "torchao"

    def recognises(self, module: nn.Module) -> bool:
        kind = type(getattr(module, "weight", None))
        known = kind.__module__.startswith("torchao.") and kind.__name__ in (_FLOAT8, _NF4)
        return known and isinstance(module, nn.Linear)

    def format(self, module: Any) -> str | None:
        if type(module.weight).__name__ == _NF4:
            return NF4.name
        return FORMATS[module.weight.qdata.dtype].name

    def obstacle(self, module: Any) -> str | None:
        weight = module.weight
        if type(weight).__name__ == _FLOAT8 and weight.qdata.dtype not in FORMATS:
            return f"its codes are {weight.qdata.dtype}, none of {', '.join(map(str, FORMATS))}"
        if weight.dim() != 2 or weight.shape != (module.out_features, module.in_features):
            return f"its weight has the shape {list(weight.shape)}"
        return None

    def packed(self, module: Any) -> PackedWeight:
        is_nf4 = type(module.weight).__name__ == _NF4
        return packed_nf4(module.weight) if is_nf4 else packed_float8(module.weight)

    def dtype(self, module: Any) -> torch.dtype:
        return module.weight.dtype
