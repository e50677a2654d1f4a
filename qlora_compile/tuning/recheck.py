"""Recheck: measures problems with a record again, and says what changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.tuning.fingerprint import fingerprint
from qlora_compile.tuning.record import Record
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.timings import Timing
from qlora_compile.tuning.tuner import Tuner

_NO_BUDGET = "the budget was spent; give more --budget"


@dataclass(frozen=True)
class Rechecked:
    """A record, and the record that replaced it or the reason why none did."""

    before: Record
    after: Record | None
    reason: str | None

    @property
    def changed(self) -> bool:
        """Whether another candidate is the choice now."""
        return self.after is not None and _name(self.before.winner) != _name(self.after.winner)

    def __str__(self) -> str:
        if self.after is None:
            return f"not measured: {self.reason}"
        old, new = self.before.winner, self.after.winner
        if self.changed:
            return f"changed: {_name(new)} ({_gain(self.after)}) in place of {_name(old)}"
        return f"the same, {new.seconds / old.seconds:.2f} times the time"


def recheck(
    store: RecordStore,
    budget: float,
    on_record: Callable[[Rechecked], None] = lambda rechecked: None,
) -> list[Rechecked]:
    """Measure again what has a valid record on this machine, for `budget` seconds in all.

    A measurement that counts replaces the record; otherwise the record stays. on_record: called
    with the result for each record.
    """
    records: dict[Problem, Record] = {}
    for record in store.read().values():
        here = fingerprint(record.problem.device)
        if here is not None and store.find(record.problem, here) == record:
            records[record.problem] = record
    found: list[Rechecked] = []
    tuner = Tuner("recheck", store, budget, each=None, again=True)

    def compare(problem: Problem, choice: Choice | None) -> None:
        here = fingerprint(problem.device)
        record = None if here is None else store.find(problem, here)
        before = records[problem]
        after = None if record == before else record
        reason = None if after else tuner.selector.unmeasured(problem) or _NO_BUDGET
        found.append(Rechecked(before, after, reason))
        on_record(found[-1])

    tuner.ensure(records, compare)
    return found


def _name(timing: Timing) -> str:
    return f"{timing.variant} {timing.config}"


def _gain(record: Record) -> str:
    return "no gain known" if record.gain is None else f"{record.gain:.2f} times as fast as dense"
