"""Corrects PEFT's and transformers' counts of parameters for packed weights.

Both add up `numel()` of each Parameter, which for a packed weight counts stored codes (half as many
as weights in a 4-bit format) and the bytes of its scales. A Parameter with another `numel()` would
mislead code that moves, shards or stores it, so the models' own methods are replaced instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from qlora_compile.hf.adapters import base_model
from qlora_compile.kernels.layout import Layout
from qlora_compile.modules.packed import PackedModule


class _Count:
    """Takes the place of a method of `model`; an object is copied and pickled with the model."""

    method: str

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def stock(self) -> Callable[..., Any]:
        return getattr(type(self.model), self.method)


class TrainableParameters(_Count):
    """PEFT's count of the trainable parameters and of all, which it prints."""

    method = "get_nb_trainable_parameters"

    def __call__(self) -> tuple[int, int]:
        trainable, total = self.stock(self.model)
        return trainable, total + _elements_beyond_stored(self.model)


class Parameters(_Count):
    """transformers' count of parameters."""

    method = "num_parameters"

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        counted = self.stock(self.model, only_trainable, exclude_embeddings)
        return counted if only_trainable else counted + _elements_beyond_stored(self.model)


_MARK = "_counts_packed_elements"
"""The attribute of a quantised model by which a PeftModel made of it later is recognised."""


def count_elements(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Have `model`, and all models among its `modules`, count the elements of packed weights."""
    setattr(base_model(model), _MARK, True)
    for module in modules:
        for count in (TrainableParameters, Parameters):
            if hasattr(type(module), count.method):
                setattr(module, count.method, count(module))


def _count_attached(outer: nn.Module, name: str, model: nn.Module | None) -> None:
    """Do so for a PeftModel that anybody makes of a quantised model."""
    # The model here is PEFT's tuner, which passes on the attributes of the model inside.
    if hasattr(type(outer), TrainableParameters.method) and hasattr(model, _MARK):
        setattr(outer, TrainableParameters.method, TrainableParameters(outer))


register_module_module_registration_hook(_count_attached)


def _elements_beyond_stored(model: nn.Module) -> int:
    """Return how many more elements the model's packed weights have than their Parameters."""
    packed = (module for module in model.modules() if isinstance(module, PackedModule))
    # Skip modules whose weight is decoded, inside `unpacked`; count shared weights once.
    layouts = {
        id(module.weight): Layout.parse(module.layout)
        for module in packed
        if not module.weight.is_floating_point()
    }
    # By the layouts, since a sharded weight may be empty here.
    return sum(
        math.prod(layout.shape) - PackedModule.stored_elements(layout)
        for layout in layouts.values()
    )
