"""bitsandbytes' 4-bit and 8-bit Linears (Dettmers et al. 2022, 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from qlora_compile.hf.bases.base import InPlaceBase


class BitsAndBytes(InPlaceBase):
    library: ClassVar[str] = "bitsandbytes"

    def recognises(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and any(
            cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__
        )

    def format(self, module: Any) -> str | None:
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            return state.quant_type
        return "int8" if str(module.weight.dtype) == "torch.int8" else None

    def obstacle(self, module: Any) -> str | None:
        from qlora_compile.hf.bases import bitsandbytes_layers

        return bitsandbytes_layers.obstacle(module)

    def adopt(self, module: Any) -> None:
        from qlora_compile.hf.bases import bitsandbytes_layers

        bitsandbytes_layers.adopt(module)

    def adapter_layer(self, layer: nn.Module) -> type[nn.Module] | None:
        if type(layer).__module__ != "peft.tuners.lora.bnb":
            return None
        from qlora_compile.hf.bases import bitsandbytes_layers

        return bitsandbytes_layers.ADAPTER_LAYERS.get(type(layer))
