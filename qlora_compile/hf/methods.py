"""PEFT's methods: knows which work over a packed weight, and refuses the others."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from peft import PeftConfig, tuners
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from qlora_compile.adapter_errors import AdapterMethodError
from qlora_compile.hf.merged_base import MergesInPlace
from qlora_compile.modules.linear import QuantizedLinear

_STOCK: tuple[type[nn.Module], ...] = (
    *(tuners.adalora.layer.SVDLinear, tuners.beft.layer.Linear, tuners.boft.layer.Linear),
    *(tuners.c3a.layer.C3ALinear, tuners.fourierft.layer.FourierFTLinear),
    *(tuners.gralora.layer.Linear, tuners.ia3.layer.Linear, tuners.lily.layer.Linear),
    *(tuners.oft.layer.Linear, tuners.poly.layer.Linear, tuners.pvera.layer.Linear),
    *(tuners.randlora.layer.Linear, tuners.road.layer.Linear, tuners.vblora.layer.Linear),
    *(tuners.vera.layer.Linear, tuners.waveft.layer.WaveFTLinear),
)
"""PEFT's adapter layers that read the base weight and its dtype only while they merge."""


class Repacked(MergesInPlace):
    """Mixin, listed before PEFT's adapter layer over a QuantizedLinear among the bases: merging
    unpacks the base weight and packs it again, unmerging restores the earlier packed weight."""

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        base = self.get_base_layer()
        with self.merging(base, base.bias), base.repacked():
            super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self: Any) -> None:
        base = self.get_base_layer()
        kept = self.taken_back(base) if self.merged else None
        with base.repacked() if kept is None else base.unpacked():
            super().unmerge()  # type: ignore[misc]
        if kept is not None:
            kept.give_back(base, base.bias)


def method_of(module: object) -> str | None:
    """Return the method that an adapter layer or a tuner of PEFT's belongs to, such as "loha".

    None for any other module.
    """
    if not isinstance(module, (BaseTuner, BaseTunerLayer)):
        return None
    places = (each.__module__.split(".") for each in type(module).__mro__)
    return next((p[2] for p in places if p[:2] == ["peft", "tuners"] and len(p) > 3), None)


def _repacked(stock: type[nn.Module]) -> type[nn.Module]:
    # Pickle finds a class by its name in the module.
    name = f"Repacked_{stock.__module__.split('.')[2]}"
    globals()[name] = type(name, (Repacked, stock), {"__module__": __name__})
    return globals()[name]


REPACKED = {stock: _repacked(stock) for stock in _STOCK}
"""Our classes, by the PEFT class that each replaces over a QuantizedLinear."""

WORKING = ("lora", *sorted(stock.__module__.split(".")[2] for stock in _STOCK))
"""The methods that work over packed weights."""


def check(layer: nn.Module, base: QuantizedLinear) -> None:
    """Raise AdapterMethodError if the new adapter `layer` does not work over `base`."""
    method = method_of(layer)
    if method not in WORKING:
        raise _error(f"{base}", method)


def check_first(tuner: BaseTuner, model: nn.Module) -> None:
    """Make `tuner`, before it changes the model, refuse a config whose method does not work over
    the packed weights of `model`."""
    packed = (isinstance(module, QuantizedLinear) for module in model.modules())
    if method_of(tuner) != "lora" and any(packed):
        # The two methods that PEFT calls first, with a new tuner and with one more adapter.
        for name in ("_pre_injection_hook", "_check_new_adapter_config"):
            setattr(tuner, name, partial(_checked, tuner, name))


def _checked(tuner: Any, name: str, *args: Any) -> None:
    _check_config(tuner, next(each for each in args if isinstance(each, PeftConfig)))
    getattr(type(tuner), name)(tuner, *args)


def _check_config(tuner: Any, config: Any) -> None:
    method = config.peft_type.value.lower()
    if method in WORKING:
        return
    model = tuner.model
    found = tuner._prepare_adapter_config(copy.deepcopy(config), tuner.get_model_config(model))
    every = found.target_modules == "all-linear"
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")
        if isinstance(module, QuantizedLinear) and (
            every or tuner._check_target_module_exists(found, name)
        ):
            raise _error(name, method)


def refuse(site: str, method: str | None) -> None:
    """Raise AdapterMethodError if an adapter of `method`, at a `site`, prevents packing."""
    if method is not None and method not in WORKING:
        raise _error(site, method)


def _error(site: str, method: str | None) -> AdapterMethodError:
    return AdapterMethodError(site=site, method=method, known=", ".join(WORKING))
