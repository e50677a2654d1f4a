"""Full training: weights that are trained in full in a model with adapters or frozen weights.

`quantize` leaves them alone, since packing would freeze them.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from qlora_compile.hf import adapters

REASON = "it is trained in full"


class TrainedInFullWarning(UserWarning):
    """`quantize` leaves weights as they are, because they are trained in full."""


def is_partly_frozen(modules: Mapping[str, nn.Module]) -> bool:
    """Whether the model of these `modules` has adapters, or a parameter that is not trained.

    If it has neither, nobody has chosen what to train: all weights of a model that has just been
    loaded require a gradient.
    """
    parameters = (p for module in modules.values() for p in module.parameters(recurse=False))
    return adapters.has_adapters(modules) or not all(p.requires_grad for p in parameters)


def warn(weights: Collection[Any]) -> None:
    """Warn of the `weights` that `quantize` does not pack."""
    size = sum(weight.nbytes for weight in weights)
    message = (
        f"{len(weights)} weights ({size:,} bytes) stay unquantised, because they, or other weights "
        "of the same layer of experts, are trained in full; to pack them, call "
        "requires_grad_(False) on their layers before optimize()"
    )
    warnings.warn(message, TrainedInFullWarning, stacklevel=4)
