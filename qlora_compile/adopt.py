"""Adoption: quantise, attach adapters, and make every quantised layer a site of the fused op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from qlora_compile.errors import (
    AlreadyAdaptedError,
    AlreadyQuantizedError,
    MetaDeviceError,
    NoLinearError,
    ReplacedForwardError,
    StrictError,
    WeightValueError,
)
from qlora_compile.hf import adapters, expert_adapters, experts, full_training
from qlora_compile.hf.bases.registry import base_of
from qlora_compile.hf.blocks import full_precision_linears, kept_linears, repeated_blocks
from qlora_compile.hf.conv1d import Conv1D, LinearSite, as_linear
from qlora_compile.kernels.formats.base import BlockSize
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.weight_reads import read_by_parent


def check(
    model: nn.Module,
    lora: object,
    *,
    quantize: str | None,
    block_size: BlockSize,
    double_quantize: bool,
    strict: bool,
    scope: str,
) -> list[str]:
    """The Linears and Conv1Ds to pack. Raises the error of everything `adopt` would stumble over;
    changes nothing."""
    options: dict[str, Any] = {}
    if quantize is not None:
        options = _options(quantize, block_size, double_quantize)
        # What is wrong whatever the weight.
        format_named(quantize).layout((1, 1), **options)
    sites = adapters.linear_sites(model)
    if not sites or isinstance(model, LinearSite):
        raise NoLinearError(model=type(model).__name__)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise MetaDeviceError(site=name)
    obstacles = unadoptable(model)
    if strict and obstacles:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in obstacles.items())
        raise StrictError(count=len(obstacles), reasons=reasons)
    whole = scope == "model" or not repeated_blocks(model)
    for name, module in model.named_modules():
        if (name or whole) and "forward" in module.__dict__:
            raise ReplacedForwardError(site=name or type(model).__name__)
    if lora is not None and adapters.has_adapters(model):
        raise AlreadyAdaptedError(model=type(model).__name__)
    if quantize is not None:
        for name, linear in sites.items():
            if is_quantized(linear):
                raise AlreadyQuantizedError(site=name, kind=type(linear).__name__, value=quantize)
    # PEFT freezes everything but what its config has it train, whatever was trained before.
    trained = (
        full_training.trained_in_full(model)
        if lora is None
        else adapters.check_lora_config(model, lora, quantize=quantize is not None)
    )
    if quantize is None:
        return []
    packed = [name for name in _quantizable(model) if name not in trained]
    for name in packed:
        weight = sites[name].weight
        format_named(quantize).layout((weight.shape[0], weight.shape[1]), **options)
        invalid = weight.numel() - int(weight.detach().isfinite().sum())
        if invalid:
            raise WeightValueError(site=name, count=invalid)
    for name, invalid in experts.check_finite(model):
        raise WeightValueError(site=name, count=invalid)
    return packed


def adopt(
    model: nn.Module,
    lora,
    *,
    packed: Sequence[str],
    quantize: str | None,
    block_size: BlockSize,
    double_quantize: bool,
) -> nn.Module:
    """Quantises the Linears named in `packed` in place, one after another, lets PEFT attach `lora`
    and quantises experts; returns the PeftModel if one was made, else `model`."""
    keep_trained = lora is not None or full_training.is_partly_frozen(model)
    if quantize is not None:
        if lora is None and keep_trained:
            _warn_of_trained(model)
        options = _options(quantize, block_size, double_quantize)
        sites = adapters.linear_sites(model)
        for name in packed:
            # The last reference but the model's own goes with it: one layer exists twice at a time.
            linear = as_linear(sites.pop(name))
            replacement = QuantizedLinear.from_linear(linear, quantize, site=name, **options)
            adapters.replace_base(model, name, replacement)
    if lora is not None:
        model = adapters.attach(model, lora)
    if quantize is not None:
        # After PEFT, which sizes the experts' adapters by their parameters.
        options = _options(quantize, block_size, double_quantize)
        experts.pack(model, quantize, keep_trained=keep_trained, **options)
    experts.adopt(model)
    left = unadoptable(model)
    for name, linear in adapters.linear_sites(model).items():
        if name not in left and (base := base_of(linear)) is not None:
            base.adopt(linear)
    for module in list(model.modules()):
        adapters.adopt_adapter_layer(module)
        expert_adapters.adopt(module)
    return model


def _options(quantize: str, block_size: BlockSize, double_quantize: bool) -> dict[str, Any]:
    """The options of a format; one without double quantisation does without."""
    double = double_quantize and format_named(quantize).has_double_quantize
    return {"block_size": block_size, "double_quantize": double}


def unadoptable(model: nn.Module) -> dict[str, str]:
    """Quantised layers of other libraries that stay as they are: site → reason."""
    reasons = {}
    for name, linear in adapters.linear_sites(model).items():
        base = base_of(linear)
        if base is not None and (reason := base.obstacle(linear)) is not None:
            reasons[name] = reason
    return reasons


def is_quantized(linear: nn.Module) -> bool:
    return isinstance(linear, QuantizedLinear) or base_of(linear) is not None


def _quantizable(model: nn.Module) -> list[str]:
    """Every plain Linear and Conv1D but heads, tied weights, what the model computes with itself
    and what PEFT trains."""
    left = {*kept_linears(model), *full_precision_linears(model), *adapters.trained_copies(model)}
    left |= {name.removesuffix(".base_layer") for name in read_by_parent(model)}
    return [
        name
        for name, linear in adapters.linear_sites(model).items()
        if name not in left and type(linear) in (nn.Linear, Conv1D)
    ]


def _warn_of_trained(model: nn.Module) -> None:
    trained, sites = full_training.trained_in_full(model), adapters.linear_sites(model)
    kept = [sites[name].weight for name in _quantizable(model) if name in trained]
    packed = experts.packable(model, keep_trained=True)
    others = experts.packable(model, keep_trained=False).items()
    kept += [site.weight for name, site in others if name not in packed]
    if kept:
        full_training.warn(kept)
