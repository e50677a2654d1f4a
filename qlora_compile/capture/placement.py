"""Placement: makes a region the forward of its module, and takes it off again.

nn.DataParallel copies the attributes of every module in every call, for each GPU, and gives the
copies weights of their own. A region on a copy would compute with its own module's weights, so the
copies of blocks get the forward that was there before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from qlora_compile.hf.replaced_forward import forward_place

REGION = "_qlora_compile_region"
"""The attribute of a module that holds its region, even after its forward has been replaced."""

_REPLICATE = "_replicate_for_data_parallel"
"""The method of a module that nn.DataParallel calls for a copy."""

_REPLICATED = "its block ran uncompiled, in a copy for each GPU (nn.DataParallel)"


def place(region: Any) -> None:
    module = region.module
    setattr(module, forward_place(module), region)
    setattr(module, REGION, region)
    setattr(module, _REPLICATE, partial(_replicated, region))


def take_off(module: nn.Module) -> Any:
    """Give `module`, or a copy of its attributes, the earlier forward, unless somebody has replaced
    the region since; return the region."""
    region, attribute = module.__dict__.pop(REGION), forward_place(module)
    module.__dict__.pop(_REPLICATE, None)
    if module.__dict__.get(attribute) is region:
        if attribute == "forward" and region.replaced is None:
            del module.forward
        else:
            own = region.kind.module_class.forward.__get__(module)
            setattr(module, attribute, region.replaced or own)
    return region


def _replicated(region: Any) -> nn.Module:
    if region.planned.left is None:
        region.leave_uncompiled(_REPLICATED)
    if region.first_step is not None and region.module.training:
        region.first_step.warn_of_replicas()
    replica = type(region.module)._replicate_for_data_parallel(region.module)
    take_off(replica)
    return replica
