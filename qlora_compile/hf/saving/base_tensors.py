"""The base model's tensors, by the names that they have without PEFT's wrappers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from qlora_compile.errors import OffloadedWeightError
from qlora_compile.hf.adapters import base_model
from qlora_compile.hf.bases.base import RepackedBase
from qlora_compile.hf.bases.registry import base_of
from qlora_compile.hf.conv1d import Conv1D, LinearSite
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.saving_errors import (
    ForeignLayerError,
    MergedWeightsError,
    SavedModelTypeError,
)


def pretrained(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model that `model` is or wraps. Raises SavedModelTypeError."""
    found = base_model(model)
    if not isinstance(found, PreTrainedModel):
        raise SavedModelTypeError(value=type(found).__name__)
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the original of a module that PEFT adapts, or of which PEFT trains a copy."""
    while True:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the base model under each of its names.

    Raises:
        MergedWeightsError: an adapter is merged into one of them.
    """
    merged = getattr(model, "merged_adapters", ()) if isinstance(model, BaseTunerLayer) else ()
    if merged:
        raise MergedWeightsError(site=prefix, adapter=merged[0])
    model = unwrapped(model)
    yield prefix, model
    for name, child in model.named_children():
        yield from base_modules(child, f"{prefix}.{name}" if prefix else name)


class BaseTensors:
    """What transformers would save of the base model of `model`, without copies.

    plain: tensors by their names, only one of tied ones, which transformers reads. packed: the
    packed weights by their modules' names. dtypes: the dtypes of these weights before packing.
    unpacked: the Linears that are not packed.

    Raises:
        SavedModelTypeError, MergedWeightsError, OffloadedWeightError, ForeignLayerError: it cannot
        be saved.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = pretrained(model)
        self.packed: dict[str, PackedWeight] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.unpacked: list[str] = []
        plain: dict[str, Tensor] = {}
        module: Any
        for name, module in base_modules(self.model):
            prefix = f"{name}." if name else ""
            if is_packed(module):
                if any(p.device.type == "meta" for p in module.parameters(recurse=False)):
                    raise OffloadedWeightError(site=name)
                self.packed[name] = module.packed
                self.dtypes[name] = getattr(module, "weight_dtype", self.model.dtype)
                if getattr(module, "bias", None) is not None:
                    plain[f"{prefix}bias"] = module.bias.data
                continue
            if isinstance(base := base_of(module), RepackedBase):
                kind = type(module).__name__
                raise ForeignLayerError(site=name, kind=kind, library=base.library)
            module._save_to_state_dict(plain, prefix, keep_vars=False)
            if isinstance(module, LinearSite):
                self.unpacked.append(name)
        for name, tensor in plain.items():
            if tensor.device.type == "meta":
                raise OffloadedWeightError(site=name)
        for name in self.model._keys_to_ignore_on_save or ():
            plain.pop(name, None)
        self.plain = remove_tied_weights_from_state_dict(plain, self.model)

    @functools.cached_property
    def conv1ds(self) -> list[str]:
        """The packed weights, stored [N, K] as those of Linears are, for which the architecture has
        a Conv1D, with a weight [K, N]."""
        with torch.device("meta"):
            skeleton: Any = type(self.model)(self.model.config)
        modules = dict(skeleton.named_modules())
        return [name for name in self.packed if isinstance(modules.get(name), Conv1D)]


def is_packed(module: Any) -> bool:
    """Whether `module` holds a PackedWeight, of our own or adopted."""
    return hasattr(type(module), "packed")
