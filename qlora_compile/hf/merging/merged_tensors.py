"""MergedTensors: the tensors of a model with its adapters merged, made one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from qlora_compile.hf.conv1d import Conv1D
from qlora_compile.hf.merging.dense_layer import (
    Weights,
    adapters_of,
    dense,
    dense_parameter,
    merged_layer,
    merged_parameter,
)
from qlora_compile.hf.saving.base_tensors import is_packed, pretrained
from qlora_compile.saving_errors import (
    MergedWeightsError,
    MissingTensorError,
    UnknownAdapterError,
    UnmergeableError,
)


class MergedTensors:
    """The tensors that transformers would save of `model` if its adapters were merged.

    config: a copy of the model's configuration, without settings of quantisation. tied: whether
    tensors that the architecture ties are equal; if not, all are written, and the configuration
    says so. weights: as in `merged_layer`.

    Raises:
        SavedModelTypeError, MergedWeightsError, UnknownAdapterError, MissingTensorError: the model
        cannot be merged.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, weights: Weights | None) -> None:
        self.base: Any = pretrained(model)
        self._weights, self._dtype = weights, dtype
        self._last: tuple[str, Any] = ("", None)
        self._check(model, weights)
        self.config = copy.deepcopy(self.base.config)
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        with torch.device("meta"):
            self._skeleton: Any = type(self.base)(self.config)
        self._names = self._saved_names()
        kept = [self.base._keep_in_fp32_modules, self.base._keep_in_fp32_modules_strict]
        self._full_precision = {part for names in kept for part in names or ()}

    def _check(self, model: Any, weights: Weights | None) -> None:
        for name, module in self.base.named_modules():
            if merged := isinstance(module, BaseTunerLayer) and module.merged_adapters:
                raise MergedWeightsError(site=name, adapter=merged[0])
        known = getattr(model, "peft_config", {})
        for name in weights or ():
            if name not in known:
                listed = ", ".join(map(repr, known)) or "none"
                raise UnknownAdapterError(value=name, known=listed)

    def _saved_names(self) -> list[str]:
        """Return the names to write; untie tensors that are no longer equal."""
        state = self._skeleton.state_dict()
        ties: dict[str, str] = self._skeleton.all_tied_weights_keys
        self.tied = all(self._equal(one, other) for one, other in ties.items())
        if not self.tied:
            for config in {id(c): c for c in (self.config, self.config.get_text_config())}.values():
                config.tie_word_embeddings = False
        ignored = set(self.base._keys_to_ignore_on_save or ())
        ignored |= set(ties) if self.tied else set()
        return [name for name in state if name not in ignored]

    def _equal(self, one: str, other: str) -> bool:
        parts = [self._found(name.rpartition(".")[0]) for name in (one, other)]
        plain = [each for each in parts if not isinstance(each, BaseTunerLayer | _Wrapper)]
        if len(plain) == 2:
            leaf = one.rpartition(".")[2], other.rpartition(".")[2]
            tensors = [getattr(each, n) for each, n in zip(plain, leaf, strict=True)]
            if tensors[0] is tensors[1]:
                return True
        return torch.equal(self.value(one), self.value(other))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by its name in a checkpoint, in the dtype that was asked for.

        The tensors of one block are made together, as transformers splits and joins some.
        """
        for _, names in groupby(self._names, _block):
            made = {name: self._cast(name, self.value(name)) for name in names}
            yield from revert_weight_conversion(self._skeleton, made).items()

    def _cast(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        kept = not self._full_precision.isdisjoint(name.split("."))
        return value.to(torch.float32 if kept else self._dtype)

    def value(self, name: str) -> Tensor:
        """Return one tensor by its name in the model, in float32 or its own dtype."""
        path, _, leaf = name.rpartition(".")
        module = self._found(path)
        expected = self._skeleton.get_submodule(path)
        if isinstance(module, ParamWrapper):
            value = merged_parameter(module, leaf, name, self._weights)
        elif isinstance(module, TrainableTokensWrapper):
            names = module.active_adapters if self._weights is None else list(self._weights)
            known = adapters_of(module.token_adapter)
            chosen = [each for each in names if each in known]
            value = module.token_adapter.get_merged_weights(chosen)
        else:
            if isinstance(module, BaseTunerLayer) or is_packed(module):
                module = self._dense(module, path)
            value = getattr(module, leaf, None)
            if value is None:
                raise MissingTensorError(site=name, model=type(self.base).__name__, problem="none")
            value = dense_parameter(value)
            # A Conv1D is packed as a Linear.
            if isinstance(expected, Conv1D) and leaf == "weight" and isinstance(module, nn.Linear):
                value = value.t()
        shape = getattr(expected, leaf).shape
        if value.shape != shape:
            problem = f"one of shape {list(value.shape)}, not {list(shape)}"
            raise MissingTensorError(site=name, model=type(self.base).__name__, problem=problem)
        return value.detach()

    def _dense(self, module: Any, path: str) -> nn.Module:
        """Return a merged or decoded layer; the last one is kept, as its bias is asked for next."""
        if self._last[0] != path:
            adapted = isinstance(module, BaseTunerLayer)
            self._last = (
                path,
                merged_layer(module, path, self._weights) if adapted else dense(module, path),
            )
        return self._last[1]

    def _found(self, path: str) -> nn.Module:
        """Return the adapter layer at a module's name, or the copy that PEFT trains."""
        module: nn.Module = self.base
        for part in filter(None, path.split(".")):
            while isinstance(module, BaseTunerLayer) and part not in module._modules:
                module = module.base_layer  # type: ignore[assignment]
            module = self._trained(module._modules[part], path)
        return module

    def _trained(self, module: Any, site: str) -> nn.Module:
        if isinstance(module, TrainableTokensWrapper) or not isinstance(
            module, AuxiliaryTrainingWrapper
        ):
            return module
        names = list(module.active_adapters if self._weights is None else self._weights)
        names = [name for name in names if name in module.modules_to_save]  # type: ignore[operator]
        if len(names) > 1:
            raise UnmergeableError(
                site=site, reason=f"the adapters {names} each train a copy of it in full"
            )
        if not names or getattr(module, "disable_adapters", False):
            return module.original_module
        return module.modules_to_save[names[0]]  # type: ignore[index]


_Wrapper = AuxiliaryTrainingWrapper


def _block(name: str) -> str:
    """Return the name up to its first number, or all of the name."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: at + 1])
