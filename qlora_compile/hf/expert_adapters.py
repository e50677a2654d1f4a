"""PEFT's LoRA on a Parameter (`target_parameters`): handed to the experts' op as factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import Tensor, nn
from torch.func import functional_call

from qlora_compile.hf.adapter_slots import SlottedLayer
from qlora_compile.hf.experts import Factors, is_served, is_transposed
from qlora_compile.modules.experts import PackedExperts


# PEFT recognises its wrapper by this very name when a further adapter is added.
class ParamWrapper(SlottedLayer, PeftParamWrapper):
    """PEFT's wrapper without a parametrization, which breaks graphs.

    Over experts that our op computes the base layer is called with the low-rank factors; over every
    other module, with the adapted parameter in the parameter's place, for the length of the call.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        served = is_served(self.get_base_layer()) and self.parameter_name in _WEIGHTS
        if served and self.slots and torch.compiler.is_compiling():
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
        """The parameter with the adapters' products added, the sum rounded as PEFT rounds it."""
        if len(names) == 1 and self.num_experts > 1:
            left, right, scaling = self.get_delta_factors(names[0])
            with torch.autocast(parameter.device.type, enabled=False):
                return torch.baddbmm(parameter, left, right, alpha=scaling)
        delta = self.get_delta_weight(names[0])
        for name in names[1:]:
            delta = delta + self.get_delta_weight(name)
        return parameter + delta

    def _with_factors(self, factors: Factors, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        others = kwargs.pop("factors", None) or {}
        factors_by_weight = {**others, self.parameter_name: factors}
        return self.base_layer(x, *args, **kwargs, factors=factors_by_weight)

    def _factors(self, adapters: list[tuple[Tensor, Tensor, Any]]) -> Factors:
        """The adapters, each the weights of its A and B and its scaling, side by side: [A1; A2] and
        [s1 B1 | s2 B2]."""
        parts = []
        for weight_a, weight_b, scaling in adapters:
            # As PEFT lays them out: A [E * R, K], B [N, R * E].
            a = weight_a.reshape(self.num_experts, -1, weight_a.shape[-1])
            b = weight_b.reshape(weight_b.shape[0], -1, self.num_experts).permute(2, 0, 1)
            # PEFT may take what the model reads for what it writes; it says so by this.
            if self._did_swap_in_out_features == is_transposed(self.get_base_layer()):
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            dtype = self.get_param().dtype
            parts.append((a.to(dtype), b.to(dtype), scaling))
        if len(parts) == 1:
            return parts[0]
        lora_a = torch.cat([a for a, _, _ in parts], dim=1)
        return lora_a, torch.cat([scaling * b for _, b, scaling in parts], dim=2), 1.0

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """PEFT looks here for what a further adapter is to be added to: where the experts are
        packed their own module no longer has the parameter."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        packed = self.get_param()
        if not recurse and isinstance(packed, PackedExperts):
            yield f"{prefix}{'.' if prefix else ''}{self.parameter_name}", packed.weight

    # Asked for by PEFT, of the name above.
    gate_up_proj = up_proj = down_proj = property(lambda self: self.get_param())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with self._unpacked():
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        with self._unpacked():
            super().unmerge()

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """The base has its parameter again inside, and what that has become is packed after."""
        base, name, packed = self.get_base_layer(), self.parameter_name, self.get_param()
        if not isinstance(packed, PackedExperts):
            yield
            return
        delattr(base, name)
        parameter = packed.parameter()
        setattr(base, name, parameter)
        try:
            yield
            merged = parameter.data
        finally:
            delattr(base, name)
            setattr(base, name, packed)
        packed.pack(merged)


_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def adopt(module: nn.Module) -> None:
    """Makes a stock wrapper one of ours."""
    if type(module) is PeftParamWrapper:
        module.__class__ = ParamWrapper


def active_rank(model: nn.Module, site: str) -> int:
    """The rank of the active adapters of the expert weight `site`, summed; 0 without any."""
    path, _, parameter = site.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # inside what PEFT trains in full, where its own names come between
        return 0
    while isinstance(module, PeftParamWrapper):
        if module.parameter_name == parameter and not (module.disable_adapters or module.merged):
            return sum(module.r[name] for name in module.active_adapters if name in module.r)
        module = module.base_layer
    return 0
