"""What users run today: PEFT over bitsandbytes' layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def with_bitsandbytes(model: Any, bits: int) -> Any:
    """Replace the Linears of a transformers model, except its head, by bitsandbytes' 4-bit (NF4,
    double quantisation) or 8-bit ones, as transformers does when it loads."""
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or linear is model.get_output_embeddings():
            continue
        size, weight = (linear.in_features, linear.out_features), linear.weight.data
        bias = linear.bias is not None
        if bits == 4:
            layer: Any = bnb.nn.Linear4bit(*size, bias, weight.dtype, True, "nf4")
            parameter: Any = bnb.nn.Params4bit
            # The layer keeps the quant_state that FSDP2 takes from its weight.
            layer.weight = parameter(weight, False, quant_type="nf4", module=layer)
        else:
            layer = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, threshold=6.0)
            layer.weight = bnb.nn.Int8Params(weight, False)
        if linear.bias is not None:
            layer.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to(linear.weight.device))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def without_repacking(model: Any) -> Any:
    """Keep bitsandbytes from changing 4-bit weights in evaluation: on CPUs that multiply bfloat16
    it would round absmax and inputs to bfloat16, in place."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
