"""Which instructions of a main loop turn codes into weights, found by following the data.

Method: whatever depends on a value that the loop loads into registers, up to the tensor cores,
the stores and the addresses, is decoding; so is what only prepares constants for it. The loads
themselves, addressing, synchronisation and the multiplication are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.static.mix import DECODE, TENSOR, instruction_class
from bench.static.operands import reads, writes
from bench.static.sass import Instruction

_LOADS = frozenset({"global load", "shared load"})
_ENDS = TENSOR | {"tensor memory", "global store", "shared store", "asynchronous copy", "bulk copy"}


def decode_mix(loop: Sequence[Instruction]) -> Counter[str]:
    """Instructions of each class that decode, per pass of `loop` and warp."""
    kinds = [instruction_class(instruction.opcode) for instruction in loop]
    sources = [reads(instruction) for instruction in loop]
    results = [writes(instruction) for instruction in loop]
    decoding = _forward(kinds, sources, results, [i.predicate for i in loop])
    decoding |= _preparing(decoding, kinds, sources, results)
    counted = DECODE | {"uniform"}
    return Counter(kinds[index] for index in decoding if kinds[index] in counted)


def _forward(
    kinds: list[str], sources: list[set[str]], results: list[set[str]], predicates: list[str]
) -> set[int]:
    """Indices of what depends on loaded values, once around the loop and again until it settles."""
    carried: set[str] = set()
    decoding: set[int] = set()
    while True:
        before = (len(carried), len(decoding))
        loaded = set(carried)
        for index, kind in enumerate(kinds):
            if kind in _LOADS:
                loaded |= results[index]
            elif kind in _ENDS:
                loaded -= results[index]
            elif sources[index] & loaded:
                decoding.add(index)
                loaded |= results[index]
            elif not predicates[index]:
                loaded -= results[index]
        carried |= loaded
        if (len(carried), len(decoding)) == before:
            return decoding


def _preparing(
    decoding: set[int], kinds: list[str], sources: list[set[str]], results: list[set[str]]
) -> set[int]:
    """Indices of what computes only for the decoding ones, such as constants made afresh."""
    found: set[int] = set()
    while True:
        users = _users(kinds, sources, results)
        new = {
            index
            for index, kind in enumerate(kinds)
            if index not in decoding | found
            and kind not in _LOADS | _ENDS
            and users[index]
            and users[index] <= decoding | found
        }
        if not new:
            return found
        found |= new


def _users(kinds: list[str], sources: list[set[str]], results: list[set[str]]) -> list[set[int]]:
    """For each index, who reads its result before something overwrites it, around the loop."""
    count = len(kinds)
    users: list[set[int]] = [set() for _ in range(count)]
    for index in range(count):
        live = set(results[index])
        for offset in range(1, count + 1):
            other = (index + offset) % count
            if sources[other] & live:
                users[index].add(other)
            live -= results[other]
            if not live:
                break
    return users
