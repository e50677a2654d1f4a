"""Adapters of a LoRA layer as compiled code reads them: by position, not by name.

PEFT keeps adapters in dictionaries by their names and scalings as numbers. Code that Dynamo
compiles from that holds for these names and numbers alone: each further adapter, and each new
scaling, would be compiled anew. Compiled code reads `slots` instead, in which an adapter is its
tensors, scaling included. Every call of a block brings the slots up to date first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Slot(NamedTuple):
    """One active adapter: y += (drop(x) aᵀ bᵀ + bias) * scaling.

    a [R, K], b [N, R], bias [N]. scaling: of no dimension, float32, or float64 where `a` is.
    dropout: the probability of dropping an element of x now, 0 in evaluation.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: Tensor
    dropout: float


class SlottedLayer:
    """What PEFT's LoRA layers of Linears are given, as a base before them, to run by slots where
    they are compiled; elsewhere they run as PEFT wrote them.

    slots: the active adapters; empty where none is, or they are merged; None where PEFT's own
    forward has to be compiled: a variant of LoRA is active, a factor is no plain Linear, or the
    layer has not been called in a block yet.
    """

    slots: tuple[Slot, ...] | None = None
    _slots_state: list[Any] | None = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        slots = self.slots
        if slots is None or args or kwargs or not torch.compiler.is_compiling():
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
        """Unmerges adapters that are disabled, as PEFT's forward does first. That rewrites the base
        weight, so compiled code leaves it to this."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()

    def refresh_slots(self: Any) -> None:
        """Brings `slots` up to date with what PEFT's own attributes say now."""
        state: list[Any] = [self._disable_adapters]
        adapters: list[tuple[Any, Any, Any, float]] = []
        if not self._disable_adapters and not self.merged_adapters:
            for name in self.active_adapters:
                if name in self.lora_A:
                    parts = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
                    adapters.append((*parts, self.scaling[name]))
                    state += _state(*adapters[-1], name in self.lora_variant)
        if state != self._slots_state:
            plain = all(state[index] for index in range(1, len(state), _PARTS))
            self.slots = tuple(_slot(*each) for each in adapters) if plain else None
            self._slots_state = state

    def forget_slots(self) -> None:
        """Has PEFT's own forward compiled until the slots are refreshed."""
        self.slots = self._slots_state = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[misc]
        return {k: v for k, v in state.items() if k not in ("slots", "_slots_state")}


def _state(a: Any, b: Any, dropout: Any, scaling: float, variant: bool) -> tuple[Any, ...]:
    """First whether a slot can stand for an adapter, then all that its slot is made of. Tensors are
    told by their `id`, which no other has while the slot holds them."""
    plain = type(a) is type(b) is nn.Linear and a.bias is None and not variant
    known = isinstance(dropout, (nn.Identity, nn.Dropout))
    tensors = id(a.weight), id(b.weight), id(b.bias)
    return (plain and known, *tensors, a.weight.device, scaling, _probability(dropout))


_PARTS = 7
"""Items that `_state` has for each adapter."""


def _probability(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _slot(a: nn.Linear, b: nn.Linear, dropout: nn.Module, scaling: float) -> Slot:
    with torch.inference_mode(False):
        dtype = torch.promote_types(torch.float32, a.weight.dtype)
        number = torch.full((), scaling, dtype=dtype, device=a.weight.device)
    return Slot(a.weight, b.weight, b.bias, number, _probability(dropout))
