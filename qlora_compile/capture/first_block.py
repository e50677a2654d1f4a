"""The first trained block of a model: its input requires no gradient by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qlora_compile.hf.parameters_in_use import parameters_in_use


def with_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple, dict]:
    """Return the inputs of the block `module`, the first floating-point one requiring a gradient.

    Otherwise no input of the first trained block would require a gradient, and Dynamo would compile
    that block separately, which costs more than the unneeded gradient. A block where nothing is
    trained keeps its inputs: if none requires a gradient, nothing of the block is differentiated,
    and its hooks for the backward do not run.
    """
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(key, str) and key != "hidden_states":
            continue
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.requires_grad or not any(p.requires_grad for p in parameters_in_use(module)):
                break
            # A clone, not the leaf itself: the block may write to its input.
            fresh = value.detach().requires_grad_().clone()
            if isinstance(key, str):
                return args, kwargs | {key: fresh}
            return (*args[:key], fresh, *args[key + 1 :]), kwargs
    return args, kwargs
