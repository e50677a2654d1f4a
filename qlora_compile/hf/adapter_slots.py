"""Adapter slots: the adapters of a LoRA layer by position, for compiled code to read.

PEFT keeps adapters in dictionaries by their names, and scalings as numbers. Code that Dynamo
compiled from these would be valid for the same names and numbers only, and would be compiled again
for each further adapter and each new scaling. Compiled code reads `slots` instead, where an adapter
consists of tensors, including the scaling. Every call of a block first updates the slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_compile.hf.own_graphs import in_own_graph
from qlora_compile.hf.replaced_forward import called_forward


class Slot(NamedTuple):
    """One active adapter: y += (drop(x) aᵀ bᵀ + bias) * scaling.

    a: [R, K]. b: [N, R]. bias: [N]. scaling: without dimensions, float32, or float64 if `a` is.
    dropout: the present probability of dropping an element of x, 0 in evaluation.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: Tensor
    dropout: float


class SlottedLayer:
    """Mixin, listed before a PEFT LoRA layer among the bases: runs by slots in a block's graph.

    Elsewhere the layer runs PEFT's own forward. slots: the active adapters; empty if there are
    none, or if they are merged; None if PEFT's own forward must be compiled, because a variant of
    LoRA is active, a factor is not a plain Linear, or no block has called the layer yet.
    """

    slots: tuple[Slot, ...] | None = None
    _slots_state: list[Any] | None = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        by_slots = torch.compiler.is_compiling() and in_own_graph() and not (args or kwargs)
        slots = self.slots if by_slots else None
        if slots is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result = self.base_layer(x)
        dtype = result.dtype
        for a, b, bias, scaling, dropout in slots:
            x = self._cast_input_dtype(x, a.dtype)
            dropped = nn.functional.dropout(x, dropout) if dropout else x
            low_rank = nn.functional.linear(dropped, a)
            result = result + nn.functional.linear(low_rank, b, bias) * scaling
        return result.to(dtype)

    def unmerge_disabled(self: Any) -> None:
        """Unmerge adapters that are disabled.

        PEFT's forward begins with this step, which rewrites the base weight; compiled code must not
        do so.
        """
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()

    def refresh_slots(self: Any) -> None:
        """Bring `slots` up to date with PEFT's own attributes."""
        state: list[Any] = [self._disable_adapters]
        adapters: list[tuple[Any, Any, Any, float]] = []
        for name, *parts in self.active_parts():
            adapters.append((*parts, self.scaling[name]))
            state += _state(*adapters[-1], name in self.lora_variant)
        if state != self._slots_state:
            plain = all(state[index] for index in range(1, len(state), _PARTS))
            self.slots = tuple(_slot(*each) for each in adapters) if plain else None
            self._slots_state = state

    def active_parts(self: Any) -> Iterator[tuple[str, nn.Module, nn.Module, nn.Module]]:
        """Yield each adapter that the layer's output contains: its name, A, B and dropout."""
        if not self._disable_adapters and not self.merged_adapters:
            a, b, dropout = (self._modules[each]._modules for each in _ADAPTER_PARTS)
            for name in self.active_adapters:
                if name in a:
                    yield name, a[name], b[name], dropout[name]

    def forget_slots(self) -> None:
        """Make Dynamo compile PEFT's own forward until the slots are refreshed."""
        self.slots = self._slots_state = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[misc]
        return {k: v for k, v in state.items() if k not in ("slots", "_slots_state")}


def _state(a: Any, b: Any, dropout: Any, scaling: float | Tensor, variant: bool) -> tuple[Any, ...]:
    """Return whether a slot can represent the adapter, followed by the parts of that slot.

    Tensors are represented by their `id`, which is unique while the slot holds them. A scaling that
    is a tensor, as PEFT's hotswap makes it, may be written to.
    """
    plain = type(a) is type(b) is nn.Linear and not variant
    plain = plain and isinstance(dropout, (nn.Identity, nn.Dropout))
    plain = plain and _parameter(a, "bias") is None
    for module in (a, b, dropout):
        if "forward" in module.__dict__ and called_forward(module):
            plain = False
    weight = _parameter(a, "weight")
    tensors = id(weight), id(_parameter(b, "weight")), id(_parameter(b, "bias"))
    number = (id(scaling), version(scaling)) if isinstance(scaling, Tensor) else scaling
    return plain, *tensors, weight.device, weight.dtype, number, _probability(dropout)


def version(tensor: Tensor) -> int | None:
    """Return a number that every write to `tensor` changes; None if torch counts no writes."""
    return None if tensor.is_inference() else tensor._version


def _parameter(module: nn.Module, name: str) -> Any:
    """Return `module.name`, faster than by attribute if it is a Parameter or None."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


_ADAPTER_PARTS = ("lora_A", "lora_B", "lora_dropout")

_PARTS = 8
"""How many items `_state` returns for an adapter."""


def _probability(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _slot(a: nn.Linear, b: nn.Linear, dropout: nn.Module, scaling: float | Tensor) -> Slot:
    with torch.inference_mode(False):
        dtype = torch.promote_types(torch.float32, a.weight.dtype)
        number = torch.full((), float(scaling), dtype=dtype, device=a.weight.device)
    return Slot(a.weight, b.weight, b.bias, number, _probability(dropout))
