"""PEFT's LoRA layers for other libraries' Linears, after such a Linear has been packed anew."""

from __future__ import annotations

from typing import Any

_PLACES = tuple(f"peft.tuners.lora.{name}" for name in ("awq", "gptq", "hqq", "torchao"))
_ALIAS = "quant_linear_module"
"""PEFT's second name for the layer below."""


def is_of_library(layer: object) -> bool:
    """Whether `layer` is PEFT's LoRA layer for another library's Linears."""
    return type(layer).__module__ in _PLACES


def settle(layer: Any) -> None:
    """Give `layer`, which is to get the class for plain Linears, the attributes of that class, and
    remove the replaced Linear from it."""
    layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False
    layer._modules.pop(_ALIAS, None)
