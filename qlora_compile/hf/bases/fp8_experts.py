"""transformers' FP8Experts: the experts of a layer in 8-bit floats, with a scale for each block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_compile.hf.experts import IMPLEMENTATION, ExpertSite, experts_forward, settle
from qlora_compile.hf.packings.fp8 import FORMATS, packed_fp8
from qlora_compile.modules.experts import PackedExperts

_ORIGIN = "transformers FP8 layer"


def recognises(module: nn.Module) -> bool:
    """Whether `module` is an FP8Experts whose weights are 8-bit floats."""
    kind = type(module)
    if kind.__name__ != "FP8Experts" or not kind.__module__.startswith("transformers."):
        return False
    return all(parameter.dtype != torch.int8 for parameter in module.parameters(recurse=False))


def adopt(site: ExpertSite) -> bool:
    """Pack the weight of `site` anew, in a recognised module; the codes are not copied. Return
    whether it was in 8-bit floats.

    Raises StoredWeightError.
    """
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    module: Any = site.module
    weight, scales = getattr(module, site.parameter), getattr(module, f"{site.parameter}_scale_inv")
    if weight.dtype not in FORMATS:
        return False
    # FP8Experts looks for its implementation in a list of its own.
    ALL_FP8_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    packed = packed_fp8(weight.data, scales.data, _block(weight, scales, module.block_size))
    experts = PackedExperts(packed, site.experts, False, torch.bfloat16)
    experts.origin = _ORIGIN
    for name in (site.parameter, f"{site.parameter}_scale_inv"):
        delattr(module, name)
    settle(module, site.parameter, experts)
    return True


def _block(weight: Any, scales: Any, block: Any) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale. Small gate and up weights have a block each,
    whatever `block` says."""
    if block is None:
        return None
    n, rows = weight.shape[1], scales.shape[1]
    high = block[0] if rows == -(-n // block[0]) else n // rows
    return high, block[1]
