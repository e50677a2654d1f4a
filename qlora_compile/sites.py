"""Inventory: lists every Linear and every weight of experts of a model, in one walk through it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qlora_compile.hf import adapters, experts, foreign, full_training
from qlora_compile.hf.bases.base import Base
from qlora_compile.hf.bases.registry import base_of
from qlora_compile.hf.blocks import full_precision_linears, kept_linears
from qlora_compile.hf.conv1d import Conv1D, LinearSite
from qlora_compile.hf.replaced_forward import replaced_forward
from qlora_compile.kernels.cpu.slow_products import may_be_slow
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.weight_reads import read_by_parent

OUTSIDE = "outside the blocks, and neither quantised nor adapted"
"""Why a plain Linear is left to torch that nothing else keeps from being fused."""


@dataclass
class LinearEntry:
    """One Linear or Conv1D. name: its own name, or that of the adapter layer around it.

    method: the method of PEFT's adapter around the layer, None without one. kept: why the layer is
    never quantised and, unless it is adapted, not fused; None for other layers. full_precision:
    whether transformers keeps the layer in float32. read_by_parent: whether the module around the
    layer computes with its weight. The properties read `module`, as quantising and adopting
    replace it.
    """

    name: str
    module: LinearSite
    method: str | None
    kept: str | None
    full_precision: bool
    read_by_parent: bool

    @property
    def weight(self) -> Tensor:
        return self.module.weight if self.base is None else self.base.weight(self.module)

    @property
    def base(self) -> Base | None:
        """The adopter, if the layer is another library's quantised one."""
        return base_of(self.module)

    @property
    def obstacle(self) -> str | None:
        """Why a weight that another library has quantised cannot be read; None if it can."""
        if isinstance(self.module, QuantizedLinear):
            return None
        return (
            foreign.obstacle(self.module) if self.base is None else self.base.obstacle(self.module)
        )

    @property
    def origin(self) -> str | None:
        """Where the packed weight comes from; None if the weight is not quantised."""
        if isinstance(self.module, QuantizedLinear):
            return self.module.origin
        return None if self.base is None else self.base.origin

    @property
    def adapted(self) -> bool:
        return self.method is not None

    @property
    def other_method(self) -> str | None:
        """Why the site's adapter is not fused, None if it can be or there is none."""
        if self.method in (None, "lora"):
            return None
        return f"its adapter is PEFT's {self.method}, not LoRA, and runs as PEFT wrote it"

    @property
    def left_alone(self) -> str | None:
        """Why the site is not to be fused; None if it is."""
        return self.obstacle or self.other_method or (None if self.adapted else self.kept)

    @property
    def may_be_slow(self) -> bool:
        """Whether this is a plain layer that can be fused, and torch may compute its product by
        slow loops on this CPU."""
        plain = not self.is_quantized and self.method is None and self.obstacle is None
        return plain and may_be_slow(self.weight)

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.module, QuantizedLinear) or self.base is not None

    @property
    def is_quantizable(self) -> bool:
        """Whether this is a plain Linear or Conv1D whose weight nothing needs unquantised."""
        needed = self.kept is not None or self.full_precision or self.read_by_parent
        needed |= replaced_forward(self.module) is not None
        plain = type(self.module) in (nn.Linear, Conv1D) and self.base is None
        return plain and foreign.obstacle(self.module) is None and not needed

    @property
    def format(self) -> str:
        """The name of the format that stores the weight, or the weight's dtype."""
        if isinstance(self.module, QuantizedLinear):
            return self.module.format
        found = None if self.base is None else self.base.format(self.module)
        return found or foreign.stored_as(self.weight)


def _is_site(module: nn.Module) -> bool:
    return foreign.is_linear(module) or base_of(module) is not None


def _is_foreign(module: nn.Module) -> bool:
    return foreign.acts_as_linear(module) and base_of(module) is None


class Inventory:
    """The modules and sites of `model` at the time of creation, by name, in the model's order.

    Attaching adapters makes an inventory out of date: PEFT wraps modules, copies those it trains in
    full, and may repeat layers. Quantising and adopting do not.

    modules: every module by its first name. linears, experts: the sites. foreign: other layers that
    act as Linears. trained: the sites that are trained in full; empty unless the model
    `is_partly_frozen`, because in a model that has just been loaded all weights require a gradient
    without anybody's choice.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        every = dict(model.named_modules(remove_duplicate=False))
        first: dict[int, str] = {}
        self.modules = {
            name: module
            for name, module in every.items()
            if first.setdefault(id(module), name) == name
        }
        linears = adapters.linear_sites(self.modules, _is_site)
        kept = kept_linears(every) | adapters.trained_copies(self.modules, linears)
        full_precision = full_precision_linears(self.modules)
        read = {name.removesuffix(".base_layer") for name in read_by_parent(self.modules)}
        self.linears = {
            name: LinearEntry(
                name=name,
                module=linear,
                method=adapters.method_at(model, name),
                kept=kept.get(name),
                full_precision=name in full_precision,
                read_by_parent=name in read,
            )
            for name, linear in linears.items()
        }
        self.foreign = adapters.linear_sites(self.modules, _is_foreign)
        self.experts = experts.sites(self.modules)
        self.is_partly_frozen = full_training.is_partly_frozen(self.modules)
        weights = (self.linears | self.experts).items() if self.is_partly_frozen else ()
        self.trained = {name for name, site in weights if site.weight.requires_grad}

    def quantizable(self) -> list[LinearEntry]:
        """Return the Linears and Conv1Ds that can be quantised.

        These are all plain ones except heads, tied weights, layers kept in float32, layers whose
        weight the model reads itself, and layers that PEFT trains in full.
        """
        return [entry for entry in self.linears.values() if entry.is_quantizable]

    def replace(self, entry: LinearEntry, packed: QuantizedLinear) -> None:
        """Replace the entry's layer by `packed`, in the model and here.

        Call this layer by layer, so that only one layer at a time exists in both forms.
        """
        place = adapters.replace_base(self.model, entry.name, packed)
        self.modules[place] = entry.module = packed
