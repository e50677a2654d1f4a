"""Linears whose weight is a tensor of torchao, version 0.18: its Int8Tensor and its
IntxUnpackedToInt8Tensor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from qlora_compile.hf.bases.base import RepackedBase
from qlora_compile.hf.packings import torchao_integers
from qlora_compile.kernels.packed import PackedWeight

_TENSORS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


class TorchaoIntegers(RepackedBase):
    library: ClassVar[str] = "torchao"

    def recognises(self, module: nn.Module) -> bool:
        kind = type(getattr(module, "weight", None))
        known = kind.__module__.startswith("torchao.") and kind.__name__ in _TENSORS
        return known and isinstance(module, nn.Linear)

    def format(self, module: Any) -> str | None:
        return torchao_integers.format_name(module.weight)

    def obstacle(self, module: Any) -> str | None:
        if getattr(module.weight, "act_pre_scale", None) is not None:
            return "torchao scales its input (act_pre_scale); leave out SmoothQuant and AWQ"
        return None

    def packed(self, module: Any) -> PackedWeight:
        return torchao_integers.packed_tensor(module.weight)

    def dtype(self, module: Any) -> torch.dtype:
        return module.weight.dtype
