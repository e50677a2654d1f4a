"""DoRA over bitsandbytes' layers; imported where bitsandbytes is there."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from qlora_compile.hf.dora import DoraLayer


class DoraLinear4bit(DoraLayer, Linear4bit):  # type: ignore[misc]
    pass


class DoraLinear8bitLt(DoraLayer, Linear8bitLt):  # type: ignore[misc]
    pass


DORA_LAYERS = {Linear4bit: DoraLinear4bit, Linear8bitLt: DoraLinear8bitLt}
"""By the class of stock PEFT's that each stands for."""
