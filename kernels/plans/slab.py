"""Where pieces of scratch memory lie in one slab: those that are never needed at once share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Of every piece in bytes, as large as what torch's allocators give kernels at least."""


@dataclass(frozen=True)
class Piece:
    """size: in bytes. first, last: the steps that touch the piece, and all between them."""

    size: int
    first: int
    last: int


def packed(pieces: Sequence[Piece]) -> tuple[list[int], int]:
    """The offset of each piece in bytes, and the bytes of the slab.

    Greedy by size, as of the planners that Pisarchyk and Lee compare ("Efficient memory management
    for deep neural net inference", 2020): the largest piece goes first, each to the lowest place.
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
