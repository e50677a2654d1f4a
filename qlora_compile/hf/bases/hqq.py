"""hqq's `HQQLinear` (Badri and Shaji 2023), version 0.2.8."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.bases.base import RepackedBase, comes_from
from qlora_compile.hf.packings import hqq
from qlora_compile.kernels.packed import PackedWeight


class Hqq(RepackedBase):
    library: ClassVar[str] = "hqq"

    def recognises(self, module: nn.Module) -> bool:
        return comes_from(module, "hqq", "HQQLinear")

    def format(self, module: Any) -> str | None:
        if self.obstacle(module) is not None:
            return None
        return hqq.HqqStorage.read(module.meta).format

    def obstacle(self, module: Any) -> str | None:
        if not module.ready:
            return "hqq has not quantised its weight yet"
        try:
            hqq.HqqStorage.read(module.meta)
        except StoredWeightError as error:
            return str(error)
        return None

    def weight(self, module: Any) -> Tensor:
        return module.W_q

    def packed(self, module: Any) -> PackedWeight:
        meta = module.meta
        tensors = {"codes": module.W_q.data, "scales": meta["scale"], "zeros": meta["zero"]}
        return hqq.packed(tensors, hqq.HqqStorage.read(meta))

    def dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype
