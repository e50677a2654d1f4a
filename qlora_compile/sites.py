"""Inventory: every Linear and every weight of experts of a model, listed once and handed on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qlora_compile.hf import adapters, experts, full_training
from qlora_compile.hf.bases.base import Base
from qlora_compile.hf.bases.registry import base_of
from qlora_compile.hf.blocks import full_precision_linears, kept_linears
from qlora_compile.hf.conv1d import Conv1D, LinearSite
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.weight_reads import read_by_parent


@dataclass
class LinearEntry:
    """One Linear or Conv1D. name: its own, or that of the adapter layer around it.

    kept: why it is never quantised and, unless it is adapted, left alone. full_precision: whether
    transformers keeps it in float32. read_by_parent: whether the module around it computes with its
    weight. What quantising or adopting changes is read off `module`.
    """

    name: str
    module: LinearSite
    adapted: bool
    kept: str | None
    full_precision: bool
    read_by_parent: bool

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def base(self) -> Base | None:
        """The adopter of another library's quantised layer."""
        return base_of(self.module)

    @property
    def obstacle(self) -> str | None:
        """Why another library's quantised layer stays as it is."""
        return None if self.base is None else self.base.obstacle(self.module)

    @property
    def left_alone(self) -> str | None:
        """Why the site is not fused; None if it is to be."""
        return self.obstacle or (None if self.adapted else self.kept)

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.module, QuantizedLinear) or self.base is not None

    @property
    def is_quantizable(self) -> bool:
        """Whether it is a plain Linear or Conv1D whose weight nothing needs in full precision."""
        needed = self.kept is not None or self.full_precision or self.read_by_parent
        return type(self.module) in (nn.Linear, Conv1D) and not needed

    @property
    def format(self) -> str:
        """The name of the format that stores its weight, or the weight's dtype."""
        if isinstance(self.module, QuantizedLinear):
            return self.module.format
        found = None if self.base is None else self.base.format(self.module)
        return found or str(self.weight.dtype).removeprefix("torch.")


class Inventory:
    """The modules and sites of `model`, by name and in the model's order, as they stand when it is
    made, by one walk through the model.

    Attaching adapters makes it out of date: PEFT wraps modules, copies those it trains in full, and
    may repeat layers. Quantising and adopting do not.

    modules: every module by its first name. trained: the sites that somebody chose to train in
    full, where the model `is_partly_frozen`: all weights of a model that has just been loaded
    require a gradient.
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
        linears = adapters.linear_sites(self.modules)
        kept = kept_linears(every) | adapters.trained_copies(self.modules, linears)
        full_precision = full_precision_linears(self.modules)
        read = {name.removesuffix(".base_layer") for name in read_by_parent(self.modules)}
        self.linears = {
            name: LinearEntry(
                name=name,
                module=linear,
                adapted=adapters.is_adapted(model, name),
                kept=kept.get(name),
                full_precision=name in full_precision,
                read_by_parent=name in read,
            )
            for name, linear in linears.items()
        }
        self.experts = experts.sites(self.modules)
        self.is_partly_frozen = full_training.is_partly_frozen(self.modules)
        weights = (self.linears | self.experts).items() if self.is_partly_frozen else ()
        self.trained = {name for name, site in weights if site.weight.requires_grad}

    def quantizable(self) -> list[LinearEntry]:
        """Every plain Linear and Conv1D but heads, tied weights, what the model computes with
        itself and what PEFT trains."""
        return [entry for entry in self.linears.values() if entry.is_quantizable]

    def replace(self, entry: LinearEntry, packed: QuantizedLinear) -> None:
        """Puts `packed` where the entry's Linear is, in the model and here: at no time do two
        layers exist twice."""
        place = adapters.replace_base(self.model, entry.name, packed)
        self.modules[place] = entry.module = packed
