"""Filling a skeleton, a transformers model on the meta device, from a checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_compile.hf import loading
from qlora_compile.hf.packing import finish
from qlora_compile.hf.quantizer import QloraCompileConfig
from qlora_compile.modules.packed import PackedModule
from qlora_compile.saving_errors import SkeletonError


def fill(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    format: str | None,
    options: Mapping[str, Any],
) -> None:
    """Give `model` the weights in `checkpoint`, each packed in `format` as soon as it is read.

    The weights get the dtype of the skeleton. format: None for weights as they are stored.

    Raises:
        SkeletonError: the model is not a transformers model on the meta device, or the checkpoint
            is of another class; the model is unchanged.
        What `from_pretrained` and `qlora_compile.load` raise.
    """
    if not isinstance(model, PreTrainedModel):
        raise SkeletonError(model=type(model).__name__, problem="it is not a transformers model")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            problem = f"{name} is on {parameter.device}, not on the meta device"
            raise SkeletonError(model=type(model).__name__, problem=problem)
    path, training = os.fspath(checkpoint), model.training
    if format is None:
        loaded = loading.load_model(path, dtype=model.dtype)
    else:
        loaded = type(model).from_pretrained(
            path,
            config=copy.deepcopy(model.config),
            dtype=model.dtype,
            quantization_config=QloraCompileConfig(format, **options),
        )
    if type(loaded) is not type(model):
        problem = f"the checkpoint is of a {type(loaded).__name__}"
        raise SkeletonError(model=type(model).__name__, problem=problem)
    vars(model).clear()
    vars(model).update(vars(loaded))
    model.train(training)
    if any(isinstance(module, PackedModule) for module in model.modules()):
        finish(model)  # what was done for `loaded` is done for `model`
