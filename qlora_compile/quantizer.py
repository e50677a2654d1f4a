"""The quantizer that transformers finds by `QloraCompileConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qlora_compile.hf.quantizer import PackingQuantizer, QloraCompileConfig, registered

__all__ = ["QloraCompileConfig", "Quantizer"]


@registered
class Quantizer(PackingQuantizer):
    """Packs what `qlora_compile.optimize` packs in a model that has just been loaded."""

    def sites(self, model: nn.Module) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        # Imported here: this module is imported by transformers' own import, before PEFT can be.
        from qlora_compile.hf import experts
        from qlora_compile.sites import Inventory

        inventory = Inventory(model)
        linears = {entry.name: entry.module for entry in inventory.quantizable()}
        return linears, experts.packable(inventory.experts, keep_trained=False)
