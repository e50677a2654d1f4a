"""PEFT's LoRA layers of its own for other libraries' Linears, once such a Linear is packed anew."""

from __future__ import annotations

from typing import Any

_PLACES = tuple(f"peft.tuners.lora.{name}" for name in ("awq", "gptq", "hqq", "torchao"))
_ALIAS = "quant_linear_module"
"""A second name that PEFT gives the layer below."""


def is_of_library(layer: object) -> bool:
    """Whether `layer` is PEFT's LoRA layer for another library's Linears."""
    return type(layer).__module__ in _PLACES


def settle(layer: Any) -> None:
    """Give `layer`, whose class is to be one of a plain Linear's, what such a layer has, and take
    the replaced Linear out of it."""
    layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False
    layer._modules.pop(_ALIAS, None)
