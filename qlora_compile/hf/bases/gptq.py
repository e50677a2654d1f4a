"""GPTQ's layers (Frantar et al. 2023), as AutoGPTQ 0.7 and GPTQModel 5 define them.

Both have kernels that reorder the codes when a model is loaded. The layers named here keep the
codes as a checkpoint holds them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.bases.base import RepackedBase, comes_from
from qlora_compile.hf.packings import gptq
from qlora_compile.kernels.packed import PackedWeight

_UNCHANGED = ("qlinear_cuda", "qlinear_cuda_old", "qlinear_triton", "torch", "tritonv2")
"""Modules of the two packages whose layers leave the codes as they were."""


class Gptq(RepackedBase):
    library: ClassVar[str] = "gptq"

    def recognises(self, module: nn.Module) -> bool:
        found = comes_from(module, "auto_gptq") or comes_from(module, "gptqmodel")
        return found and hasattr(module, "qweight") and "awq" not in type(module).__module__

    def format(self, module: Any) -> str | None:
        return "int4" if module.bits <= 4 else "uint8"

    def obstacle(self, module: Any) -> str | None:
        if type(module).__module__.rpartition(".")[2] not in _UNCHANGED:
            return (
                f"its kernel, {type(module).__name__}, has put the codes in an order of its own; "
                "load the model with the torch backend"
            )
        if getattr(module, "adapter", None) is not None:
            return "gptqmodel has put an adapter of its own on it"
        try:
            self._storage(module)
        except StoredWeightError as error:
            return str(error)
        return None

    def weight(self, module: Any) -> Tensor:
        return module.qweight

    def packed(self, module: Any) -> PackedWeight:
        names = {"codes": "qweight", "zeros": "qzeros", "scales": "scales", "index": "g_idx"}
        return gptq.packed(
            {role: getattr(module, name) for role, name in names.items()}, self._storage(module)
        )

    def _storage(self, module: Any) -> gptq.GptqStorage:
        # GPTQModel changes the zero points of version 1 when it loads them, and says so.
        version = module.qzero_format() if hasattr(module, "qzero_format") else 1
        stored = {number: name for name, number in gptq.VERSIONS.items()}[version]
        pack_dtype = str(module.qweight.dtype).removeprefix("torch.")
        return gptq.GptqStorage.read(
            {
                "bits": module.bits,
                "group_size": module.group_size,
                "checkpoint_format": stored,
                "pack_dtype": pack_dtype,
            }
        )

    def dtype(self, module: Any) -> torch.dtype:
        return module.scales.dtype
