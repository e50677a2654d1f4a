"""Tuner: finds a measured choice for each problem in records, or measures one now."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from qlora_compile.kernels.call_times import Contradiction
from qlora_compile.kernels.cpu import background
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.selector import Selector
from qlora_compile.tuning.caution import CAREFUL, Caution
from qlora_compile.tuning.cpu_figures import checked_cpu, measured_cpu
from qlora_compile.tuning.fingerprint import Fingerprint, fingerprint
from qlora_compile.tuning.judgement import Doubt, choice_of, judge
from qlora_compile.tuning.record import Key, Record, portable, utc_now
from qlora_compile.tuning.refuted import RefutedRecords
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.timings import Timings
from qlora_compile.tuning.trials import Trials
from qlora_compile.tuning.warning import RecordWarning, warn_of_unmeasured

logger = logging.getLogger(__name__)

AUTO_BUDGET = 60.0
"""Seconds to spend on measuring one model's problems, unless a budget was asked for."""

_SECONDS_EACH = 0.3
"""Seconds of timing one problem, unless the budget leaves less."""

_SHORTEST_LIMIT, _LONGEST_RUN = 30.0, 120.0
"""A candidate is given up if it does not return, compiling included, within the seconds of the
budget, which for this are clamped to these bounds."""


_APART = 0.25
"""The fewest seconds between two measurements of one problem: a burst of other work may pass, so
that it does not mislead the second one too."""

_GIVE_UP = 8
"""After this many disturbed measurements in a row the machine counts as busy while `ensure` runs,
unless a budget was asked for."""


@dataclass(frozen=True)
class _Doubted:
    """Why a problem's last measurement does not count. runs: how many there were. claimed: as in
    Doubt. ended: when the last one ended, by the monotonic clock."""

    reason: str
    claimed: str | None
    runs: int
    ended: float


class Records(Protocol):
    """A place where records are looked up."""

    def find(self, problem: Problem, here: Fingerprint) -> Record | None: ...


class Tuner:
    """Fills the records of its `selector` for the problems it is given.

    name: the name of the selector. store: where records are found and, if it is a RecordStore,
    written. budget: the seconds to spend on measuring in all; 0 measures nothing. each: the seconds
    of timing one problem, where problems with a single candidate are not timed; None times every
    problem for its share of the budget. again: whether also to measure problems that have a record.
    `measurements` is the number of problems with a measurement within the limits of `caution`; the
    cost model chooses for the others, and `selector.unmeasured` holds the reasons.
    """

    caution: Caution = CAREFUL

    def __init__(
        self,
        name: str,
        store: Records,
        budget: float,
        *,
        each: float | None = _SECONDS_EACH,
        again: bool = False,
    ) -> None:
        self.selector = Selector(name)
        self.store = store
        self.budget = budget
        self.each = each
        self.again = again
        self.measurements = 0
        self._modelled: set[Problem] = set()
        self._busy: list[str] = []
        # A tuner that never measures does not write to its store.
        self._writes = self._checks_cpu = budget > 0
        self._dropped: set[tuple[Key, str]] = set()
        self._refuted_records = RefutedRecords()
        self._trials = Trials(self.selector)
        self._lock = threading.Lock()

    def ensure(
        self,
        problems: Iterable[Problem],
        on_record: Callable[[Problem, Choice | None], None] = lambda problem, choice: None,
    ) -> None:
        """Find or measure a choice for each problem, in order, while the budget lasts.

        A problem whose measurement was disturbed, or seems too good, is measured again after the
        others. For problems that are not reached the cost model chooses. on_record: called with
        each problem and its recorded choice, or None.

        Raises NoCorrectVariantError if no candidate gives right results for a problem.
        """
        waiting = list(dict.fromkeys(problems))
        doubted: dict[Problem, _Doubted] = {}
        unmeasured: dict[Problem, str] = {}
        with self._lock:
            self._busy = []
            try:
                while waiting:
                    problem = waiting.pop(0)
                    known = self.selector.recorded(problem) or problem in self._modelled
                    if self.again or not known:
                        share = 1 + len(waiting)
                        doubt = self._ensure(problem, share, doubted.get(problem))
                        if doubt is not None and self._repeats(doubt):
                            doubted[problem] = doubt
                            waiting.append(problem)
                            continue
                        self._settle(problem, doubt, unmeasured)
                    on_record(problem, self.selector.recorded(problem))
            finally:
                self._trials.close()
        warn_of_unmeasured(unmeasured)

    def ensure_calls(self, calls: Iterable[tuple[Problem, bool]]) -> None:
        """Do as `ensure` for the problems of calls, each given as (forward problem, whether it
        trains)."""
        calls = dict.fromkeys(calls)
        if self.budget > 0 and any(forward.device == "cpu" for forward, _ in calls):
            start = time.monotonic()
            self._use_measured_cpu()
            self.budget -= time.monotonic() - start
        self.ensure(
            problem
            for forward, trains in calls
            for problem in self.selector.problems_to_measure(forward, trains=trains)
        )

    def refresh(self, budget: float) -> None:
        """Set a new budget, and retry problems that an earlier budget did not reach."""
        self.budget = budget
        self._modelled.clear()

    def reopen(self, store: Records) -> None:
        """Look up every record anew, in `store`."""
        with self._lock:
            self.store = store
            self._modelled.clear()
            self.selector.forget_records()

    def ensure_missed(self) -> None:
        """Do as `ensure` for the problems that calls asked for and that had no record.

        Also drop the records that real calls refute; their problems are measured anew once they are
        asked for. Does nothing while a backward is under way or a stream is captured.
        """
        if not _must_not_measure():
            contradictions = self.selector.take_contradictions()
            if contradictions:
                self._drop_refuted(contradictions)
            self.ensure(self.selector.take_misses())

    def _drop_refuted(self, contradictions: Mapping[Problem, Contradiction]) -> None:
        refuted = list(self._refuted_records.among(contradictions, self.caution))
        for problem, contradiction in refuted:
            here = fingerprint(problem.device)
            record = None if here is None else self.store.find(problem, here)
            self.selector.forget(problem)
            # Another process may have replaced the record that this process uses.
            if record is not None and record.winner.seconds == contradiction.choice.seconds:
                self._dropped.add((record.key, record.measured_at))
                if self._writes and isinstance(self.store, RecordStore):
                    self.store.discard(record)
            message = (
                f"the record of {contradiction.choice.name} for {problem} is dropped: calls take "
                f"{contradiction.factor:.2g} times as long as it says"
            )
            warnings.warn(message, RecordWarning, stacklevel=3)
        if refuted and self._checks_cpu and isinstance(self.store, RecordStore):
            # The cause of a wrong record may have spoilt the figures of the CPU too.
            self._checks_cpu = False
            model = checked_cpu(self.store.folder, self.caution).model
            if model is not None:
                self.selector.use_cpu(model)

    def _ensure(self, problem: Problem, share: int, earlier: _Doubted | None) -> _Doubted | None:
        """Find or measure the choice for `problem`, for 1 / `share` of the budget. Return why its
        last measurement does not count; `earlier` if there was no further one."""
        here = fingerprint(problem.device)
        choice = self._found(problem, here)
        doubt = earlier
        # Do not measure during a recomputation: it must match the first forward.
        if self._measures and (choice is None or self.again) and not _must_not_measure():
            start = time.monotonic()
            if earlier is not None:
                time.sleep(max(0.0, earlier.ended + _APART - start))
            # If the problems share the whole budget, one more share is left for repetitions.
            seconds = self.budget / (share if self.each is not None else share + 1)
            with self._turn(problem, here) as mine:
                if not self.again:
                    choice = self._found(problem, here)
                if mine and (choice is None or self.again):
                    measured = self._measure(problem, here, seconds, earlier)
                    doubt = measured if isinstance(measured, _Doubted) else None
                    choice = measured if isinstance(measured, Choice) else choice
            self.budget -= time.monotonic() - start
        if choice is not None:
            self.selector.remember(problem, choice)
        return doubt

    @property
    def _measures(self) -> bool:
        given_up = self.each is not None and len(self._busy) >= _GIVE_UP
        return self.budget > 0 and not given_up

    def _repeats(self, doubt: _Doubted) -> bool:
        return self._measures and doubt.runs < self.caution.runs

    def _settle(
        self, problem: Problem, doubt: _Doubted | None, unmeasured: dict[Problem, str]
    ) -> None:
        """Leave a problem that no measurement decided to the cost model."""
        reason = None if doubt is None else doubt.reason
        if self.selector.recorded(problem) is None:
            self._modelled.add(problem)
            if reason is None and self.budget > 0 and not self._measures:
                reason = self._busy[-1]
        if reason is not None:
            unmeasured[problem] = reason
            self.selector.note_unmeasured(problem, reason)

    def _found(self, problem: Problem, here: Fingerprint | None) -> Choice | None:
        record = None if here is None else self.store.find(problem, here)
        if record is None or (record.key, record.measured_at) in self._dropped:
            return None
        return choice_of(problem, record)

    @contextlib.contextmanager
    def _turn(self, problem: Problem, here: Fingerprint | None) -> Iterator[bool]:
        """Yield whether this process may measure.

        The ranks of a job take turns; all but the first then find the first one's measurements.
        """
        if here is None or not isinstance(self.store, RecordStore):
            yield True
        else:
            with self.store.exclusive(problem, here, timeout=self.budget) as mine:
                yield mine

    def _measure(
        self,
        problem: Problem,
        here: Fingerprint | None,
        seconds: float,
        earlier: _Doubted | None,
    ) -> Choice | _Doubted | None:
        if problem.device == "cpu":
            self._use_measured_cpu()
            background.finish()
        trial = self._trials.run(
            problem,
            seconds if self.each is None else min(self.each, seconds),
            min(_LONGEST_RUN, max(_SHORTEST_LIMIT, self.budget)),
            lone=self.each is None,
        )
        if self._trials.broken:
            self.budget = 0.0
        if trial is None:
            return None
        timings = judge(trial, self.caution, earlier and earlier.claimed)
        if isinstance(timings, Doubt):
            self._busy = [*self._busy, timings.reason] if timings.busy else []
            logger.info("not measured: %s: %s", problem, timings.reason)
            runs = 1 + (0 if earlier is None else earlier.runs)
            return _Doubted(timings.reason, timings.claimed, runs, time.monotonic())
        self._busy = []
        self.measurements += 1
        # A missing baseline may be due to a lack of memory that does not last: do not record it.
        if here and timings.baseline and isinstance(self.store, RecordStore):
            parts = {field.name: getattr(timings, field.name) for field in fields(Timings)}
            tried = here.of_variants(timings.variants)
            self.store.append(
                Record(**parts, problem=portable(problem), fingerprint=tried, measured_at=utc_now())
            )
        choice = choice_of(problem, timings)
        assert choice is not None
        logger.info("measured %s for %s", choice.name, problem)
        return choice

    def _use_measured_cpu(self) -> None:
        folder = self.store.folder if isinstance(self.store, RecordStore) else None
        model = measured_cpu(folder, caution=self.caution)
        if model is not None:
            self.selector.use_cpu(model)


def _must_not_measure() -> bool:
    """Whether a backward is under way, or a stream is being captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return True
    return torch._C._current_graph_task_id() != -1
