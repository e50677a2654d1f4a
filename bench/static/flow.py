"""Control flow of SASS: natural loops, and the path that a warp takes when nothing is special.

The path follows a conditional branch where it closes the main loop, or where only its target leads
over tensor-core work (an adapter's product that was placed out of line); every other one is a slow
path (waiting again for a barrier, a ragged tile, a division's exact tail) and falls through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.static.mix import TENSOR, instruction_class
from bench.static.sass import Instruction

ENDS = frozenset({"EXIT", "RET"})


@dataclass(frozen=True)
class Path:
    """A kernel as straight code around its main loop; without a loop all of it is `before`."""

    before: tuple[Instruction, ...]
    loop: tuple[Instruction, ...]
    after: tuple[Instruction, ...]

    def unrolled(self, iterations: int) -> tuple[Instruction, ...]:
        return self.before + self.loop * iterations + self.after


def natural_loops(code: Sequence[Instruction]) -> list[tuple[int, frozenset[int]]]:
    """Every loop as (index of its header, indices of its instructions), inner loops included.

    A loop belongs to a branch back to an instruction that dominates it; loops with one header
    are one. Code placed out of line, such as the retry of a barrier, counts to its loop.
    """
    successors = _successors(code)
    predecessors = _predecessors(successors)
    dominators = _immediate_dominators(successors, predecessors)
    loops: dict[int, set[int]] = {}
    for index, targets in enumerate(successors):
        for target in targets:
            if target <= index and _dominates(target, index, dominators):
                body = loops.setdefault(target, {target})
                waiting = [index]
                while waiting:
                    node = waiting.pop()
                    if node not in body:
                        body.add(node)
                        waiting += [p for p in predecessors[node] if dominators[p] is not None]
    return sorted((header, frozenset(body)) for header, body in loops.items())


def innermost_loops(code: Sequence[Instruction]) -> list[tuple[int, frozenset[int]]]:
    """The natural loops of more than one instruction that hold no other such loop.

    Retrying a barrier is a loop, too, but one inside what it serves; it has no arithmetic of its
    own and does not keep the loop around it from being innermost.
    """
    loops = [loop for loop in natural_loops(code) if not _waits(code, loop[1])]
    return [
        (header, body)
        for header, body in loops
        if not any(other < body for _, other in loops if other != body)
    ]


def _waits(code: Sequence[Instruction], body: frozenset[int]) -> bool:
    quiet = {"SYNCS", "BRA", "NOP", "NANOSLEEP", "YIELD"}
    return all(code[index].base in quiet for index in body)


def path(
    code: Sequence[Instruction], weight: Callable[[Sequence[Instruction]], tuple[int, ...]]
) -> Path:
    """The usual path through `code`; the main loop is the innermost one of greatest `weight`,
    which is given the instructions on the loop's own path."""
    successors = _successors(code)
    best: tuple[tuple[int, ...], frozenset[int], list[int]] | None = None
    for header, body in innermost_loops(code):
        steps = _walk(successors, header, body)
        taken = [code[index] for index in steps]
        value = weight(taken)
        if best is None or value > best[0]:
            best = (value, body, steps)
    everything = frozenset(range(len(code)))
    if best is None:
        return Path(tuple(code[i] for i in _walk(successors, 0, everything)), (), ())
    _, body, inside = best
    multiplying = frozenset(
        index for index, i in enumerate(code) if instruction_class(i.opcode) in TENSOR
    )
    leading = _reachable(inside[0], _predecessors(successors), everything)
    before = _walk(successors, 0, leading - body, multiplying)
    leaving = [n for i in reversed(inside) for n in successors[i] if n not in body]
    after = _walk(successors, leaving[0], everything - body) if leaving else []
    return Path(*(tuple(code[i] for i in steps) for steps in (before, inside, after)))


def _walk(
    successors: list[tuple[int, ...]],
    start: int,
    allowed: frozenset[int],
    sought: frozenset[int] = frozenset(),
) -> list[int]:
    """From `start` by falling through; a branch is taken where only its target is `allowed`, or
    where only it leads over some of what is `sought`.

    Ends where nothing allowed and new follows.
    """
    steps: list[int] = []
    seen: set[int] = set()
    following: int | None = start if start in allowed else None
    while following is not None:
        steps.append(following)
        seen.add(following)
        choices = [n for n in successors[following] if n in allowed and n not in seen]
        if len(choices) > 1 and sought:
            found = [sought & _reachable(n, successors, allowed - seen) for n in choices]
            choices = [n for n, f in zip(choices, found, strict=True) if f - found[0]] or choices
        following = next(iter(choices), None)
    return steps


def _reachable(
    start: int, edges: Sequence[Sequence[int]], allowed: frozenset[int] | set[int]
) -> frozenset[int]:
    """All indices among `allowed` that `edges` lead to from `start`, itself included."""
    reached = {start}
    waiting = [start]
    while waiting:
        new = [n for n in edges[waiting.pop()] if n in allowed and n not in reached]
        reached.update(new)
        waiting += new
    return frozenset(reached)


def _successors(code: Sequence[Instruction]) -> list[tuple[int, ...]]:
    """What may follow each index: the next one first, then a branch's target."""
    index_of = {instruction.address: index for index, instruction in enumerate(code)}
    result: list[tuple[int, ...]] = []
    for index, instruction in enumerate(code):
        target = instruction.branch_target
        leaves = instruction.base in ENDS or target is not None
        falls = index + 1 < len(code) and not (leaves and not instruction.conditional)
        branch = () if target is None else (index_of[target],)
        result.append(((index + 1,) if falls else ()) + branch)
    return result


def _predecessors(successors: list[tuple[int, ...]]) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in successors]
    for index, targets in enumerate(successors):
        for target in targets:
            result[target].append(index)
    return result


def _immediate_dominators(
    successors: list[tuple[int, ...]], predecessors: list[list[int]]
) -> list[int | None]:
    """Cooper, Harvey and Kennedy's iteration over reverse postorder; None: unreachable."""
    order: list[int] = []
    state = [0] * len(successors)
    stack = [(0, iter(successors[0]))]
    state[0] = 1
    while stack:
        node, rest = stack[-1]
        following = next((n for n in rest if not state[n]), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            state[following] = 1
            stack.append((following, iter(successors[following])))
    rank = {node: position for position, node in enumerate(order)}
    dominators: list[int | None] = [None] * len(successors)
    dominators[0] = 0
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            found: int | None = None
            for predecessor in predecessors[node]:
                if dominators[predecessor] is None:
                    continue
                found = (
                    predecessor if found is None else _meet(predecessor, found, rank, dominators)
                )
            if dominators[node] != found:
                dominators[node] = found
                changed = True
    return dominators


def _meet(a: int, b: int, rank: dict[int, int], dominators: list[int | None]) -> int:
    while a != b:
        while rank[a] < rank[b]:
            a = _above(a, dominators)
        while rank[b] < rank[a]:
            b = _above(b, dominators)
    return a


def _above(node: int, dominators: list[int | None]) -> int:
    parent = dominators[node]
    assert parent is not None
    return parent


def _dominates(a: int, b: int, dominators: list[int | None]) -> bool:
    if dominators[b] is None:
        return False
    while b != a:
        parent = _above(b, dominators)
        if parent == b:
            return False
        b = parent
    return True
