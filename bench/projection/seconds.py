"""Modelled seconds by what they go to."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Seconds:
    """products: with frozen weights, the head's and the router's too. decode: of packed weights.
    adapters: LoRA's thin products, their casts and sums. attention: of scores. bytes: everything
    elementwise in blocks, through memory. loss: of logits, through memory. launches: starting
    kernels. optimizer: the adapters' update."""

    products: float = 0.0
    decode: float = 0.0
    adapters: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0
    loss: float = 0.0
    launches: float = 0.0
    optimizer: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def __sub__(self, other: Seconds) -> Seconds:
        return self + -1 * other

    def __rmul__(self, factor: float) -> Seconds:
        return Seconds(*(factor * mine for mine in self))

    def __iter__(self):
        return (getattr(self, field.name) for field in fields(self))

    @property
    def total(self) -> float:
        return sum(self)
