"""Do the decoded control words make sense? Every result that arrives late must be waited for.

If the fields were read at the wrong bits, a register would be used before the scoreboard that
guards it: the check that this project's parser and ptxas mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.static.mix import instruction_class
from bench.static.operands import reads, writes
from bench.static.sass import BRANCHES, NO_SCOREBOARD, Instruction

# These wait in one queue with the instruction that still has to read, and so cannot overtake it.
_IN_ORDER = frozenset({"shared load", "global load", "shuffle", "spill", "constant"})


@dataclass(frozen=True)
class ScoreboardCheck:
    """guarded: results and sources that a scoreboard guards. violations: the instructions that
    read a result, or overwrite a source or result, whose scoreboard was not waited for."""

    guarded: int
    violations: tuple[Instruction, ...]


def check_scoreboards(code: Sequence[Instruction]) -> ScoreboardCheck:
    """Straight through `code`, forgetting what is pending wherever control may join or leave."""
    targets = {i.branch_target for i in code if i.branch_target is not None}
    written: dict[str, int] = {}
    being_read: dict[str, int] = {}
    guarded = 0
    violations: list[Instruction] = []
    for instruction in code:
        if instruction.address in targets:
            written.clear()
            being_read.clear()
        for pending in (written, being_read):
            for register in [r for r, board in pending.items() if instruction.wait >> board & 1]:
                del pending[register]
        sources, results = reads(instruction), writes(instruction)
        overwritten = results & being_read.keys()
        if instruction_class(instruction.opcode) in _IN_ORDER:
            overwritten.clear()
        if (sources | results) & written.keys() or overwritten:
            violations.append(instruction)
        for register in results:
            written.pop(register, None)
            being_read.pop(register, None)
        never = instruction.predicate in ("!PT", "!UPT")
        if instruction.write != NO_SCOREBOARD and not never:
            written |= dict.fromkeys(results, instruction.write)
            guarded += len(results)
        if instruction.read != NO_SCOREBOARD and not never:
            # Predicates and uniform registers are read at issue.
            late = [register for register in sources if register.startswith("R")]
            being_read |= dict.fromkeys(late, instruction.read)
            guarded += len(late)
        if instruction.base in BRANCHES or instruction.base in ("EXIT", "RET", "BSYNC", "BSSY"):
            written.clear()
            being_read.clear()
    return ScoreboardCheck(guarded, tuple(violations))
