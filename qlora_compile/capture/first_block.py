"""The first trained block of a model: its input requires no gradient by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from qlora_compile.hf.parameters_in_use import parameters_in_use


class StandIn(NamedTuple):
    """A clone that a block is given in place of the caller's tensor `value`."""

    value: Tensor
    clone: Tensor

    def write_back(self, result: Any) -> Any:
        """Give `value` what the block has written to the clone, with its history for autograd, and
        return the block's result, with `value` in place of the clone. Whether the writes have such
        a history in stock PEFT cannot be told."""
        if not self.clone._version:
            return result
        self.value.copy_(self.clone)
        if type(result) is tuple:
            return tuple(self.value if each is self.clone else each for each in result)
        return self.value if result is self.clone else result


def with_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], StandIn | None]:
    """Return the inputs of the block `module`, the first floating-point one requiring a gradient,
    and its StandIn if the caller's does not require one.

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
            clone = value.detach().requires_grad_().clone()
            stand_in = StandIn(value, clone)
            if isinstance(key, str):
                return args, kwargs | {key: clone}, stand_in
            return (*args[:key], clone, *args[key + 1 :]), kwargs, stand_in
    return args, kwargs, None
