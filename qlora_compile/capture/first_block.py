"""The input of a model's first block, which requires no gradient by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def with_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Return the inputs of a block, the first floating-point one requiring a gradient.

    Otherwise that of a model's first block would require none, and Dynamo would compile that block
    separately, which costs more than the unneeded gradient.
    """
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(key, str) and key != "hidden_states":
            continue
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.requires_grad:
                break
            # A clone, not the leaf itself: the block may write to its input.
            fresh = value.detach().requires_grad_().clone()
            if isinstance(key, str):
                return args, kwargs | {key: fresh}
            return (*args[:key], fresh, *args[key + 1 :]), kwargs
    return args, kwargs
