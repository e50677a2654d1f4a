"""AWQ's 4-bit layers (Lin et al. 2024): AutoAWQ 0.2's `WQLinear_GEMM`, and GPTQModel 5's layers of
the same storage."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_compile.hf.bases.base import RepackedBase, comes_from
from qlora_compile.hf.packings import awq
from qlora_compile.kernels.packed import PackedWeight

_UNCHANGED = ("WQLinear_GEMM", "AwqTorchLinear", "AwqGEMMLinear")


class Awq(RepackedBase):
    library: ClassVar[str] = "awq"

    def recognises(self, module: nn.Module) -> bool:
        found = comes_from(module, "awq")
        found |= comes_from(module, "gptqmodel") and "awq" in type(module).__module__
        return found and hasattr(module, "qweight")

    def format(self, module: Any) -> str | None:
        return "int4"

    def obstacle(self, module: Any) -> str | None:
        if type(module).__name__ not in _UNCHANGED:
            return (
                f"its kernel, {type(module).__name__}, stores the codes in an order of its own; "
                "load the model with the GEMM version of AutoAWQ"
            )
        if getattr(module, "adapter", None) is not None:
            return "gptqmodel has put an adapter of its own on it"
        bits = module.w_bit if hasattr(module, "w_bit") else module.bits
        return None if bits == 4 else f"its codes have {bits} bits, not 4"

    def weight(self, module: Any) -> Tensor:
        return module.qweight

    def packed(self, module: Any) -> PackedWeight:
        tensors = {"codes": module.qweight, "scales": module.scales}
        if module.qzeros is not None:
            tensors["zeros"] = module.qzeros
        return awq.packed(tensors, awq.AwqStorage(module.group_size))

    def dtype(self, module: Any) -> torch.dtype:
        return module.scales.dtype
