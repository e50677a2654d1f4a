"""Places pieces of scratch memory in one slab; pieces that are never needed at once overlap."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora_compile.kernels.plans.steps import Source

ALIGNMENT = 256
"""The alignment of every piece in bytes, the least that torch's allocators give kernels."""


@dataclass(frozen=True)
class Piece:
    """A piece of scratch memory. size: in bytes. first, last: the steps between which it is
    used."""

    size: int
    first: int
    last: int


def packed(pieces: Sequence[Piece]) -> tuple[list[int], int]:
    """Return the offset of each piece in bytes, and the bytes of the slab.

    The largest piece is placed first, each at the lowest free place: "greedy by size" in Pisarchyk
    and Lee's comparison ("Efficient memory management for deep neural net inference", 2020).
    """
    offsets: dict[int, int] = {}
    for index in sorted(range(len(pieces)), key=lambda index: -pieces[index].size):
        piece = pieces[index]
        taken = sorted(
            (at, at + pieces[other].size)
            for other, at in offsets.items()
            if pieces[other].first <= piece.last and piece.first <= pieces[other].last
        )
        offset = 0
        for start, stop in taken:
            if offset + piece.size <= start:
                break
            offset = max(offset, -(-stop // ALIGNMENT) * ALIGNMENT)
        offsets[index] = offset
    ends = [offsets[index] + piece.size for index, piece in enumerate(pieces)]
    return [offsets[index] for index in range(len(pieces))], max(ends, default=0)


def touches(steps: Iterable[Iterable[Source]]) -> dict[Source, list[int]]:
    """Return the numbers of the steps that use each source. steps: the sources of each step."""
    touched: dict[Source, list[int]] = {}
    for number, sources in enumerate(steps):
        for source in sources:
            touched.setdefault(source, []).append(number)
    return touched


def scratch(
    touched: Mapping[Source, Sequence[int]], memory: Sequence[int], kept: Collection[Source]
) -> tuple[dict[Source, int], int]:
    """Return the offset in the slab of each piece of memory that is no result, and the bytes of the
    slab.

    touched: the steps that use each source, in order. memory: the bytes of each piece. kept: the
    sources that are results.
    """
    sources = [source for source in touched if source.kind == "memory" and source not in kept]
    pieces = [Piece(memory[each.index], touched[each][0], touched[each][-1]) for each in sources]
    offsets, size = packed(pieces)
    return dict(zip(sources, offsets, strict=True)), size
