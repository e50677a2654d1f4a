"""Dense layers: an adapter layer's weight with its adapters merged, whatever stores the base.

PEFT merges, in a float32 copy of the adapter layer whose base layer is dense. The model itself does
not change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qlora_compile.hf import foreign, methods
from qlora_compile.hf.saving.base_tensors import is_packed
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.saving_errors import UnmergeableError

Weights = Mapping[str, float]
"""Factors of adapters by name, in the order in which they are merged."""


def merged_layer(layer: Any, site: str, weights: Weights | None) -> Any:
    """Return a copy of the base layer of a PEFT adapter `layer`, dense, with the adapters merged.

    Parameters are float32, weights of packed Linears [N, K]. weights: None for the active adapters,
    each in full.

    Raises:
        UnmergeableError: PEFT cannot merge one of them, or not with such a weight.
    """
    base = layer.get_base_layer()
    clone = copy.deepcopy(layer, {id(base): dense(base, site)})
    clone.__class__ = _stock(type(layer))
    clone.float()
    clone.merged_adapters = []
    names = _scale(clone, site, weights)
    if names:
        try:
            clone.merge(adapter_names=names)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UnmergeableError(site=site, reason=str(error).rstrip(".")) from error
    return clone.get_base_layer()


def merged_parameter(wrapper: Any, parameter: str, site: str, weights: Weights | None) -> Tensor:
    """Return the Parameter of experts with the adapters of `wrapper`, and of those inside it,
    merged: float32, of the Parameter's shape.

    Raises:
        UnmergeableError: as `merged_layer`.
    """
    value = dense_parameter(getattr(wrapper.get_base_layer(), parameter)).float()
    while isinstance(wrapper, ParamWrapper):
        if wrapper.parameter_name == parameter:
            holder = nn.Module()
            holder.register_parameter(parameter, nn.Parameter(value, requires_grad=False))
            clone: Any = copy.deepcopy(wrapper, {id(wrapper.base_layer): holder}).float()
            known = adapters_of(clone)
            for name in _scale(clone, site, weights):
                if name in known:
                    value = value + clone.get_delta_weight(name)
        wrapper = wrapper.base_layer
    return value


def dense_parameter(value: Tensor | PackedExperts) -> Tensor:
    """Return a Parameter of experts, decoded if it is packed, in its own dtype."""
    return value.parameter().data if isinstance(value, PackedExperts) else value.detach()


def dense(base: Any, site: str) -> Any:
    """Return a float32 copy of a base layer; for a packed one, a Linear with the decoded weight in
    its own dtype, with which the packed layer computes.

    Raises:
        UnmergeableError: only another library's code reads the weight.
    """
    if not is_packed(base):
        reason = foreign.obstacle(base) if foreign.is_linear(base) else None
        if reason is None and foreign.acts_as_linear(base) and not isinstance(base, nn.Embedding):
            reason = foreign.reason(base)
        if reason is not None:
            raise UnmergeableError(site=site, reason=reason)
        return copy.deepcopy(base).float()
    packed = base.packed
    n, k = packed.shape
    linear = nn.Linear(k, n, bias=base.bias is not None, device="meta")
    dtype = computed_in(base)
    weight = format_named(packed.format).dequantize(packed, dtype).float()
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().float().clone(), requires_grad=False)
    return linear


def computed_in(base: Any) -> torch.dtype:
    """Return the dtype that a packed layer's weight had before it was packed."""
    state = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
    found = getattr(base, "weight_dtype", None) or getattr(state, "dtype", None)
    return found or (torch.float32 if base.bias is None else base.bias.dtype)


def _stock(layer: type[nn.Module]) -> type[nn.Module]:
    """Return the class that PEFT uses over plain layers, for another class of PEFT's or ours."""
    own: Any = next(cls for cls in layer.__mro__ if cls.__module__.startswith("peft."))
    package, _, module = own.__module__.rpartition(".")
    return own if module == "layer" else import_module(f"{package}.layer").Linear


def _scale(clone: Any, site: str, weights: Weights | None) -> list[str]:
    """Multiply the scalings of the adapters of `clone`; return the names of those to merge, of
    which `clone` may lack some."""
    if weights is None:
        return [] if clone.disable_adapters else list(clone.active_adapters)
    known = adapters_of(clone)
    for name, weight in weights.items():
        if name not in known or weight == 1.0:
            continue
        if not isinstance(clone, LoraLayer) or name in clone.lora_variant:
            kind = methods.method_of(clone) if not isinstance(clone, LoraLayer) else "DoRA"
            raise UnmergeableError(
                site=site, reason=f"the adapter {name!r} is {kind}, which has no weight but 1"
            )
        clone.scaling[name] *= weight
    return [name for name in weights if name in known]


def adapters_of(layer: BaseTunerLayer) -> set[str]:
    """Return the names of the adapters that a layer has."""
    found: set[str] = set()
    for name in layer.adapter_layer_names:
        part = getattr(layer, name, None)
        if isinstance(part, nn.ModuleDict | nn.ParameterDict):
            found |= set(part.keys())
    return found
