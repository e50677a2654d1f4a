"""Weights that are trained in full, beside adapters or frozen ones: packing would freeze them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from qlora_compile.hf import adapters

REASON = "it is trained in full"


class TrainedInFullWarning(UserWarning):
    """`quantize` leaves weights as they are, because they are being trained."""


def is_partly_frozen(modules: Mapping[str, nn.Module]) -> bool:
    """Whether the model of these `modules` has adapters, or a parameter that is not trained.

    Where it has neither, nobody has chosen what to train: all weights of a model that has just been
    loaded require a gradient.
    """
    parameters = (p for module in modules.values() for p in module.parameters(recurse=False))
    return adapters.has_adapters(modules) or not all(p.requires_grad for p in parameters)


def warn(weights: Collection[Any]) -> None:
    """Tells of the `weights` that `quantize` passes over."""
    size = sum(weight.nbytes for weight in weights)
    message = (
        f"{len(weights)} weights ({size:,} bytes) are trained in full, or lie with such ones in a "
        "layer of experts, and stay unquantised; to have them packed, call requires_grad_(False) "
        "on their layers before optimize()"
    )
    warnings.warn(message, TrainedInFullWarning, stacklevel=4)
