"""Kernels that stream: the bytes their instructions move, and whether DRAM is what bounds them.

Counted from the binary: every 128-bit access of every lane, and narrower stores. Narrower loads
(scales, tables) are many lanes asking for the same few bytes, which the first-level cache answers:
of what they read, each byte is counted once. *Modelled*: cycles per program, the SM's against
DRAM's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.static.compile import Launch
from bench.static.flow import Path
from bench.static.mix import access_bits, instruction_class
from bench.static.sass import Instruction
from bench.static.sm_model import simulate
from bench.static.sm_step import LANES
from bench.static.sm_table import ACHIEVABLE_BANDWIDTH, CARDS, MULTIPROCESSORS

WIDE = 128
PROGRAMS_IN_TURN = 8


@dataclass(frozen=True)
class Bound:
    """Cycles that one program takes of one SM, *modelled*: if only the SM's own units counted, and
    if only DRAM did, at the bandwidth that streaming achieves."""

    sm_cycles: float
    dram_cycles: float

    @property
    def dram_bound(self) -> bool:
        return self.sm_cycles <= self.dram_cycles


@dataclass(frozen=True)
class Traffic:
    """Of the whole launch. minimum: bytes of all tensors, each once. moved: bytes that the
    instructions move. wide: the codes are loaded and the output is stored 128 bits at a time.
    bounds: by card of this architecture."""

    minimum: int
    moved: int
    wide: bool
    bounds: dict[str, Bound]

    @property
    def excess(self) -> float:
        """moved / minimum - 1."""
        return self.moved / self.minimum - 1


def traffic(route: Path, launch: Launch, arch: str, *, warps: int, ctas: int) -> Traffic | None:
    """None for a kernel with a loop: how often it runs is not written in the binary."""
    if route.loop:
        return None
    programs = math.prod(launch.grid)
    loads = _bytes(route.before, {"global load", "asynchronous copy"}, warps)
    stores = _bytes(route.before, {"global store"}, warps)
    sizes = sorted(t.numel() * t.element_size() for t in _tensors(launch.arguments.values()))
    # The output and the codes are the largest tensors; scales and tables are the others.
    *rest, codes, output = [0, 0, *sizes]
    beyond_codes = max(0, loads[WIDE] * programs - codes)
    moved = loads[WIDE] * programs + max(0, sum(rest) - beyond_codes)
    moved += stores.total() * programs
    wide = loads[WIDE] * programs >= codes and stores.total() == stores[WIDE]
    # Each slot of the SM runs one program after the other.
    in_turn = Path((), route.before, ())
    sm = MULTIPROCESSORS[arch]
    period = simulate(in_turn, sm, warps=warps, ctas=ctas, iterations=PROGRAMS_IN_TURN).period
    bounds = {
        name: Bound(
            sm_cycles=period / ctas,
            dram_cycles=moved
            / programs
            / (card.bandwidth * ACHIEVABLE_BANDWIDTH / card.sms / card.clock),
        )
        for name, card in CARDS.items()
        if card.arch == arch
    }
    return Traffic(minimum=sum(rest) + codes + output, moved=moved, wide=wide, bounds=bounds)


def _bytes(code: Sequence[Instruction], kinds: set[str], warps: int) -> Counter[int]:
    """Bytes of all lanes of a program by the access's width in bits."""
    moved: Counter[int] = Counter()
    for instruction in code:
        if instruction_class(instruction.opcode) in kinds:
            bits = access_bits(instruction)
            moved[bits] += bits // 8 * LANES * warps
    return moved


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(getattr(value, "base", None), torch.Tensor):
            yield value.base
