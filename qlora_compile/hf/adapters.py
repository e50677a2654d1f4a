"""PEFT: finds the adapted Linears, attaches LoRA, and merges into packed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from qlora_compile.errors import AdapterConfigError, AdapterTargetError
from qlora_compile.hf import foreign, foreign_adapters, methods
from qlora_compile.hf.adapter_slots import SlottedLayer
from qlora_compile.hf.base_readers import check_reads_no_base, initialises_from_base
from qlora_compile.hf.bases.base import InPlaceBase, RepackedBase
from qlora_compile.hf.bases.registry import base_of
from qlora_compile.hf.blocks import is_inside
from qlora_compile.hf.dora import DoraLayer, DoraLinear
from qlora_compile.hf.merged_base import MergesInPlace
from qlora_compile.hf.replaced_forward import move_hook
from qlora_compile.modules.linear import QuantizedLinear

_GRADIENT = "_peft_loraga_grad"
"""The attribute of a base layer that LoRA-GA (Wang et al. 2024) initialises adapters from."""


class QuantizedLoraLinear(MergesInPlace, DoraLinear):
    """PEFT's LoRA layer over a QuantizedLinear. Merging unpacks the base weight and packs it again,
    as PEFT does for bitsandbytes' layers; unmerging restores the earlier packed weight."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self._base()
        if base.is_unpacked:
            # PEFT merges and unmerges others while it merges a DoRA adapter.
            return LoraLinear.merge(self, safe_merge, adapter_names)
        with self.merging(base, base.bias), base.repacked():
            LoraLinear.merge(self, safe_merge, adapter_names)
        self.remeasure_base()

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        # Without a gradient of the base weight, PEFT loads what was initialised by LoRA-GA.
        if config.init_lora_weights != "lora_ga" or hasattr(self._base(), _GRADIENT):
            check_reads_no_base(config)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def unmerge(self) -> None:
        base = self._base()
        if base.is_unpacked:
            return LoraLinear.unmerge(self)
        kept = self.taken_back(base) if self.merged else None
        with base.repacked() if kept is None else base.unpacked():
            LoraLinear.unmerge(self)
        if kept is not None:
            kept.give_back(base, base.bias)
        self.remeasure_base()

    def _base(self) -> QuantizedLinear:
        base = self.get_base_layer()
        assert isinstance(base, QuantizedLinear)
        return base


class SlottedLinear(SlottedLayer, LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over a Conv1D, or over a Linear with a product of its own."""


def linear_sites(
    modules: Mapping[str, nn.Module], is_site: Callable[[nn.Module], bool] = foreign.is_linear
) -> dict[str, Any]:
    """Return every Linear or Conv1D of `modules` by its name, an adapted one by its adapter layer's
    name, without the adapters' own Linears and PEFT's trained copies."""
    sites: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in modules.items():
        if name.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}." if name else "")
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inside.append(f"{name}.")
            for part, linear in module.original_module.named_modules(prefix=name):
                if is_site(linear):
                    sites[part] = linear
        if is_site(module):
            sites[name] = module
    return sites


def method_at(model: nn.Module, site: str) -> str | None:
    """Return the PEFT method that adapts a site, None if none does."""
    return methods.method_of(wrapper_at(model, site))


def wrapper_at(model: nn.Module, site: str) -> nn.Module | None:
    """Return the module at a site's name; None inside a module that PEFT trains in full, where
    names have parts of PEFT's own."""
    try:
        return model.get_submodule(site)
    except AttributeError:
        return None


def active_rank(model: nn.Module, site: str) -> int:
    """Return the summed rank of the site's active adapters; 0 without one."""
    module = wrapper_at(model, site)
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return 0
    return sum(module.r[name] for name in module.active_adapters if name in module.r)


def trained_copies(modules: Mapping[str, nn.Module], sites: Iterable[str]) -> dict[str, str]:
    """Return the sites of which PEFT trains the weight or some of its rows, beside the adapters:
    name → reason to leave the site alone."""
    wrappers = {
        name: _trained(module)
        for name, module in modules.items()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    return {
        name: reason
        for name in sites
        for wrapper, reason in wrappers.items()
        if is_inside(name, wrapper)
    }


def _trained(wrapper: AuxiliaryTrainingWrapper) -> str:
    if isinstance(wrapper, TrainableTokensWrapper):
        return "rows of its weight are trained (trainable_token_indices)"
    return "it is trained in full (modules_to_save)"


def other_modules(modules: Mapping[str, nn.Module], sites: Collection[str]) -> dict[str, str]:
    """Return modules that PEFT adapts or trains and that are not sites, such as an Embedding:
    name → reason to leave the module alone."""
    found: dict[str, str] = {}
    for name, module in modules.items():
        if name in sites or any(is_inside(name, outer) for outer in found):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            found[name] = f"{type(module.original_module).__name__}: {_trained(module)}"
        elif isinstance(module, BaseTunerLayer) and name.rpartition(".")[2] != "token_adapter":
            found[name] = f"{type(module.get_base_layer()).__name__}: it is not a Linear"
    return found


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel, else the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_adapters(modules: Mapping[str, nn.Module]) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in modules.values())


def check_lora_config(
    model: nn.Module, modules: Mapping[str, nn.Module], config: object, *, quantize: bool
) -> set[str]:
    """Return the sites that PEFT will train beside the adapters of `config`, in full or a few rows.
    modules: those of `model`, by name.

    Raises AdapterConfigError, AdapterTargetError or PEFT's own error if attaching `config` would
    fail after it had begun to change the model.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        raise AdapterConfigError(
            field="lora", value=config, remedy="pass a peft.LoraConfig or None"
        )
    if config.r <= 0:
        raise AdapterConfigError(field="lora.r", value=config.r, remedy="use a rank of 1 or more")
    if not 0.0 <= config.lora_dropout < 1.0:
        remedy = "use a probability in [0, 1)"
        raise AdapterConfigError(field="lora_dropout", value=config.lora_dropout, remedy=remedy)
    bases = [base_of(each) for each in modules.values()]
    if quantize or any(isinstance(each, RepackedBase) for each in bases):
        check_reads_no_base(config)
    # PEFT checks the rest while it replaces modules; let it do so on a copy without data first.
    # The adapters' initialisation must find the user's random state.
    with torch.random.fork_rng():
        copied = copy.deepcopy(model, _without_data(modules.values()))
        probe = copy.copy(config)
        # The copy has no weights, but for those that bitsandbytes has packed.
        if initialises_from_base(config) and not any(isinstance(b, InPlaceBase) for b in bases):
            probe.init_lora_weights = True
        try:
            attached = dict(base_model(attach(copied, probe)).named_modules())
        except ValueError as error:
            if _matches_something(config, modules):
                raise
            leaves = {name.rpartition(".")[2] for name in linear_sites(modules)}
            targets: Any = config.target_modules
            rule = targets if isinstance(targets, str) else sorted(targets)
            raise AdapterTargetError(rule=rule, known=", ".join(sorted(leaves))) from error
    if any(isinstance(each, QuantizedLoraLinear) for each in attached.values()):
        check_reads_no_base(config)
    linears = linear_sites(attached)
    trained = {name for name, site in linears.items() if site.weight.requires_grad}
    return trained | trained_copies(attached, linears).keys()


def _matches_something(config: LoraConfig, modules: Iterable[str]) -> bool:
    """Whether a target of `config` matches one of the names. As in PEFT, others may match none."""
    targets = config.target_modules
    if not targets or targets == "all-linear":
        return True
    probe = LoraConfig(target_modules=targets)
    return any(check_target_module_exists(probe, name) for name in modules if name)


def _without_data(modules: Iterable[nn.Module]) -> dict[int, object]:
    """Return the memo for a deep copy on the meta device, with plain Linears in place of layers
    that are to be packed anew. The copy shares what bitsandbytes has packed: these Parameters
    carry state, and moving the copy's would move the model's."""
    memo: dict[int, object] = {}
    for module in modules:
        if isinstance(base_of(module), RepackedBase):
            # PEFT will find a QuantizedLinear there.
            n, k = foreign.sizes(module)
            memo[id(module)] = nn.Linear(k, n, bias=False, device="meta")
            continue
        shared = [getattr(module, name, None) for name in ("state", "quant_state")]
        memo |= {id(value): value for value in shared if value is not None}
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if type(tensor) in (nn.Parameter, torch.Tensor):
                empty = torch.empty_like(tensor.data, device="meta")
                own = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if own else empty
            else:
                memo[id(tensor)] = tensor
    return memo


def attach(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Return the PeftModel that PEFT makes of `model`, with our layers over packed bases."""
    config = copy.deepcopy(config)
    # The hook below would suffice, but PEFT would first warn of a Conv1D's fan_in_fan_out.
    config._register_custom_module({QuantizedLinear: QuantizedLoraLinear})
    return get_peft_model(model, config)


def _adopt_new(layer: nn.Module, name: str, base: nn.Module | None) -> None:
    """Give an adapter layer that PEFT makes over a packed Linear its class, before the adapter is
    made and whoever attaches it: PEFT knows no packed Linear unless a config names it."""
    if name == "model" and isinstance(layer, BaseTuner) and base is not None:
        methods.check_first(layer, base)
    if name == "base_layer" and isinstance(layer, BaseTunerLayer) and hasattr(type(base), "packed"):
        if isinstance(base, QuantizedLinear):
            methods.check(layer, base)
        _give_own_class(layer, base)


register_module_module_registration_hook(_adopt_new)


def replace_base(model: nn.Module, site: str, linear: QuantizedLinear) -> str:
    """Put `linear` in the place of the site's Linear, under its adapter if it has one; return the
    name of that place."""
    module = model.get_submodule(site)
    wrapper: Any = module
    move_hook(getattr(wrapper, "base_layer", wrapper), linear)
    if isinstance(module, BaseTunerLayer):
        wrapper.base_layer = linear
        adopt_adapter_layer(module)
        return f"{site}.base_layer"
    parent, _, leaf = site.rpartition(".")
    setattr(model.get_submodule(parent), leaf, linear)
    return site


def adopt_adapter_layer(module: nn.Module) -> None:
    """Give a stock LoRA layer of a Linear our class, by which compiled code reads adapters by
    slots, DoRA is computed as plain LoRA, and merging packs a packed base anew. A packed weight is
    never [K, N], whatever the layer's config says (fan_in_fan_out)."""
    if isinstance(module, LoraLayer):
        _give_own_class(module, module.get_base_layer())
        if isinstance(module, QuantizedLoraLinear):
            module.fan_in_fan_out = False
    if isinstance(module, DoraLayer):
        module.adopt_variants()
    if isinstance(module, BaseTuner):
        methods.check_first(module, module.model)


def _give_own_class(layer: nn.Module, linear: nn.Module | None) -> None:
    own = _own_class(layer, linear)
    if foreign_adapters.is_of_library(layer) and own is QuantizedLoraLinear:
        foreign_adapters.settle(layer)
    if own is not None:
        layer.__class__ = own  # pyright: ignore[reportAttributeAccessIssue]


def _own_class(layer: Any, linear: Any) -> type[nn.Module] | None:
    """Return our class for a stock adapter layer over `linear`; None if the layer keeps its class
    because it is ours already, or not over a Linear."""
    if type(layer) is LoraLinear:
        if isinstance(linear, QuantizedLinear):
            return QuantizedLoraLinear
        if not foreign.is_linear(linear) or foreign.obstacle(linear) is not None:
            return None
        return DoraLinear if type(linear).forward is nn.Linear.forward else SlottedLinear
    if isinstance(linear, QuantizedLinear):
        of_library = foreign_adapters.is_of_library(layer)
        return QuantizedLoraLinear if of_library else methods.REPACKED.get(type(layer))
    base = base_of(linear)
    if isinstance(base, InPlaceBase) and hasattr(linear, "packed"):
        return base.adapter_layer(layer)
    return None
