"""The library of the package's ops, and their registration.

Every op takes (x, tensors, seed, call), its backward (grads, x, tensors, seed, call), where `call`
is a text. Ops are registered by hand and not as a `custom_op`, whose wrapper takes longer than
small products do. The autograd kernel passes each tensor to torch.autograd.Function as an argument
of its own, because tensors in a list would be overlooked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("qlora_compile", "FRAGMENT")


@dataclass(frozen=True)
class Registered:
    """The functions that an op was registered with. operands: as in its schema."""

    operands: str
    compute: Callable[..., list[Tensor]]
    with_autograd: Callable[..., list[Tensor]] | None = None


REGISTERED: dict[str, Registered] = {}
"""By name."""


def register(
    name: str,
    compute: Callable[..., list[Tensor]],
    fake: Callable[..., list[Tensor]],
    gradients: type[OpFunction] | None = None,
) -> Any:
    """Define an op and return it as it appears in a graph. gradients: what differentiates it; None
    for the backward of another op."""
    operands = "Tensor x, Tensor[] tensors, Tensor? seed, str call"
    operands = f"Tensor[] grads, {operands}" if gradients is None else operands
    LIBRARY.define(f"{name}({operands}) -> Tensor[]")
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.qlora_compile, name).default
    REGISTERED[name] = Registered(operands, compute)
    if gradients is None:
        return op

    def with_autograd(
        keys: Any, x: Tensor, tensors: list[Tensor], seed: Tensor | None, text: str
    ) -> list[Tensor]:
        if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *tensors)):
            return list(gradients.apply(op, keys, text, x, seed, *tensors))
        return _below_autograd(op, keys, x, tensors, seed, text)

    LIBRARY.impl(name, with_autograd, "Autograd", with_keyset=True)
    REGISTERED[name] = Registered(operands, compute, with_autograd)
    return op


class OpFunction(torch.autograd.Function):
    """Calls an op below autograd. A subclass saves tensors and takes the gradients, of the inputs
    (op, keys, text, x, seed, *tensors)."""

    @staticmethod
    def forward(
        op: Any, keys: Any, text: str, x: Tensor, seed: Tensor | None, *tensors: Tensor
    ) -> Any:
        return tuple(_below_autograd(op, keys, x, list(tensors), seed, text))


def _below_autograd(op: Any, keys: Any, *arguments: Any) -> list[Tensor]:
    """Return the result of the kernels of `op` below autograd; keys: the dispatcher's."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
