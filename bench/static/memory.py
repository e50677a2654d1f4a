"""Counts the bytes that a kernel without a loop moves, in its instructions.

Every 128-bit access of every lane counts, and every store. In narrower loads (scales, tables) many
lanes ask for the same few bytes, which the first-level cache serves, so each byte counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.static.resources import WIDE, Resources
from qlora_compile.kernels.gpu.launch import Launch

LANES = 32


@dataclass(frozen=True)
class Traffic:
    """Bytes of a whole launch. minimum: those of all tensors, each once. moved: those that the
    instructions move. wide: whether codes are loaded and the output stored 128 bits at a time."""

    minimum: int
    moved: int
    wide: bool

    @property
    def excess(self) -> float:
        """moved / minimum - 1."""
        return self.moved / self.minimum - 1


def traffic(taken: Resources, launch: Launch) -> Traffic:
    """Count the traffic of `launch`, whose programs run each instruction once."""
    lanes = math.prod(launch.grid) * LANES * taken.warps
    loaded = taken.loads.get(WIDE, 0) * WIDE // 8 * lanes
    stored = sum(bits // 8 * count for bits, count in taken.stores.items()) * lanes
    sizes = sorted(t.numel() * t.element_size() for t in _tensors(launch.arguments.values()))
    # The output and the codes are the largest tensors; scales and tables are the others.
    *rest, codes, output = [0, 0, *sizes]
    beyond_codes = max(0, loaded - codes)
    return Traffic(
        minimum=sum(rest) + codes + output,
        moved=loaded + max(0, sum(rest) - beyond_codes) + stored,
        wide=loaded >= codes and set(taken.stores) == {WIDE},
    )


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(getattr(value, "base", None), torch.Tensor):
            yield value.base
