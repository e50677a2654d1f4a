"""Expert adapters: passes PEFT's LoRA on Parameters (`target_parameters`) to the experts' op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_module_registration_hook

from qlora_compile.hf.adapter_slots import SlottedLayer
from qlora_compile.hf.experts import Factors, displace, is_served, is_transposed, place
from qlora_compile.hf.merged_base import MergesInPlace
from qlora_compile.hf.own_graphs import in_own_graph
from qlora_compile.modules.experts import PackedExperts


# PEFT recognises its wrapper by this very name when a further adapter is added.
class ParamWrapper(MergesInPlace, SlottedLayer, PeftParamWrapper):
    """PEFT's wrapper, without its parametrization, which would break graphs.

    If our op computes the wrapped experts, the base layer is called with the low-rank factors. Any
    other base layer has the adapted parameter in place of its own during the call.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        served = is_served(self.get_base_layer()) and self.parameter_name in _WEIGHTS
        if served and torch.compiler.is_compiling() and in_own_graph() and self.slots:
            factors = self._factors([(s.a, s.b, s.scaling) for s in self.slots])
            return self._with_factors(factors, x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names or "adapter_names" in kwargs:
            return PeftParamWrapper.forward(self, x, *args, **kwargs)
        if served:
            adapters: list[Any] = [
                (self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
                for name in names
            ]
            return self._with_factors(self._factors(adapters), x, *args, **kwargs)
        parameter = self.get_param()
        if parameter.dtype.itemsize < 2 or hasattr(self.get_base_layer(), "parametrizations"):
            return PeftParamWrapper.forward(self, x, *args, **kwargs)
        path = self.parameter_name
        layer = self.base_layer
        while isinstance(layer, PeftParamWrapper):
            path, layer = f"base_layer.{path}", layer.base_layer
        adapted = {path: self._adapted(parameter, names)}
        return functional_call(self.base_layer, adapted, (x, *args), kwargs, tie_weights=False)

    def _adapted(self, parameter: Tensor, names: list[str]) -> Tensor:
        """Return the parameter plus the adapters' products, rounded as in PEFT."""
        if len(names) == 1 and self.num_experts > 1:
            left, right, scaling = self.get_delta_factors(names[0])
            with torch.autocast(parameter.device.type, enabled=False):
                return torch.baddbmm(parameter, left, right, alpha=scaling)
        delta = self.get_delta_weight(names[0])
        for name in names[1:]:
            delta = delta + self.get_delta_weight(name)
        return parameter + delta

    def _with_factors(self, factors: Factors, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        others = kwargs.pop("factors", None) or {}
        factors_by_weight = {**others, self.parameter_name: factors}
        return self.base_layer(x, *args, **kwargs, factors=factors_by_weight)

    def _factors(self, adapters: list[tuple[Tensor, Tensor, Any]]) -> Factors:
        """Concatenate adapters, each given as (weight of A, weight of B, scaling).

        Several adapters become [A1; A2] and [s1 B1 | s2 B2] with the scaling 1.
        """
        parts = []
        for weight_a, weight_b, scaling in adapters:
            # PEFT's layout is A [E * R, K], B [N, R * E].
            a = weight_a.reshape(self.num_experts, -1, weight_a.shape[-1])
            b = weight_b.reshape(weight_b.shape[0], -1, self.num_experts).permute(2, 0, 1)
            # PEFT may mistake the inputs of a weight for its outputs; this flag shows if it did.
            if self._did_swap_in_out_features == is_transposed(self.get_base_layer()):
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            dtype = self.get_param().dtype
            parts.append((a.to(dtype), b.to(dtype), scaling))
        if len(parts) == 1:
            return parts[0]
        lora_a = torch.cat([a for a, _, _ in parts], dim=1)
        return lora_a, torch.cat([scaling * b for _, b, scaling in parts], dim=2), 1.0

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        packed = self.get_param()
        if not isinstance(packed, PackedExperts):
            super().merge(safe_merge, adapter_names)
            return
        with self.merging(packed), self._unpacked(packed) as parameter:
            super().merge(safe_merge, adapter_names)
            packed.pack(parameter.data)

    def unmerge(self) -> None:
        packed = self.get_param()
        if not isinstance(packed, PackedExperts):
            super().unmerge()
            return
        kept = self.taken_back(packed) if self.merged else None
        with self._unpacked(packed) as parameter:
            super().unmerge()
            if kept is None:
                packed.pack(parameter.data)
        if kept is not None:
            kept.give_back(packed)

    @contextmanager
    def _unpacked(self, packed: PackedExperts) -> Iterator[nn.Parameter]:
        """Give the base layer its unpacked parameter inside the context, and yield it."""
        base, name = self.get_base_layer(), self.parameter_name
        displace(base, name)
        parameter = packed.parameter()
        setattr(base, name, parameter)
        try:
            yield parameter
        finally:
            delattr(base, name)
            place(base, name, packed)


_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def adopt(module: nn.Module) -> None:
    """Make `module`, if it is a wrapper of PEFT's, an instance of our class."""
    if type(module) is PeftParamWrapper:
        module.__class__ = ParamWrapper


def _adopt_new(layer: nn.Module, name: str, base: nn.Module | None) -> None:
    """Adopt a PEFT wrapper that is being made over experts that our op computes.

    The wrapper reads its parameter, which may be packed, only after it has registered its base.
    """
    if name == "base_layer" and base is not None and type(layer) is PeftParamWrapper:
        innermost = base.get_base_layer() if isinstance(base, PeftParamWrapper) else base
        if is_served(innermost):
            adopt(layer)


register_module_module_registration_hook(_adopt_new)


def active_rank(model: nn.Module, site: str) -> int:
    """Return the summed rank of the active adapters of the expert weight `site`, 0 without any."""
    path, _, parameter = site.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # in a module that PEFT trains in full, paths contain PEFT's own names
        return 0
    while isinstance(module, PeftParamWrapper):
        if module.parameter_name == parameter and not (module.disable_adapters or module.merged):
            return sum(module.r[name] for name in module.active_adapters if name in module.r)
        module = module.base_layer
    return 0
