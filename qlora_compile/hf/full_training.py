"""Weights that are trained in full, beside adapters or frozen ones: packing would freeze them."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from qlora_compile.hf import adapters, experts

REASON = "it is trained in full"


class TrainedInFullWarning(UserWarning):
    """`quantize` leaves weights as they are, because they are being trained."""


def trained_in_full(model: nn.Module) -> set[str]:
    """The sites of Linears, Conv1Ds and experts whose weight somebody chose to train.

    In a model of which nothing is frozen or adapted there are none: all weights of a model that has
    just been loaded require a gradient.
    """
    if not is_partly_frozen(model):
        return set()
    linears, of_experts = adapters.linear_sites(model), experts.sites(model)
    return {name for name, site in (linears | of_experts).items() if site.weight.requires_grad}


def is_partly_frozen(model: nn.Module) -> bool:
    """Whether the model has adapters, or a parameter that is not trained."""
    return adapters.has_adapters(model) or not all(p.requires_grad for p in model.parameters())


def warn(weights: Collection[Any]) -> None:
    """Tells of the `weights` that `quantize` passes over."""
    size = sum(weight.nbytes for weight in weights)
    message = (
        f"{len(weights)} weights ({size:,} bytes) are trained in full, or lie with such ones in a "
        "layer of experts, and stay unquantised; to have them packed, call requires_grad_(False) "
        "on their layers before optimize()"
    )
    warnings.warn(message, TrainedInFullWarning, stacklevel=4)
