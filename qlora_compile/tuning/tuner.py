"""Tuner: finds a measured choice for each problem in records, or measures one now."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Protocol

import torch

from qlora_compile.kernels import registry, selection
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice, Measured, model_for
from qlora_compile.kernels.selector import Selector
from qlora_compile.tuning.correctness import WRONG
from qlora_compile.tuning.cpu_figures import measured_cpu
from qlora_compile.tuning.errors import NoCorrectVariantError, TuningProcessError
from qlora_compile.tuning.fingerprint import Fingerprint, fingerprint
from qlora_compile.tuning.isolated import IsolatedMeasurement
from qlora_compile.tuning.measure import Measurement, measure
from qlora_compile.tuning.record import Record, Timing, Timings, portable, utc_now
from qlora_compile.tuning.store import RecordStore

logger = logging.getLogger(__name__)

AUTO_BUDGET = 60.0
"""Seconds that measuring one model's problems may take if nobody asked for it explicitly."""

_SECONDS_EACH = 0.3
"""Seconds of timing one problem, unless the budget leaves less."""

_SHORTEST_LIMIT, _LONGEST_RUN = 30.0, 120.0
"""A candidate is given up if it does not return, compiling included, within the seconds of the
budget, which for this are clamped to these bounds."""


class WrongResultWarning(UserWarning):
    """A variant computed wrong numbers and will not be chosen; this is a bug in the package."""


class NotMeasuredWarning(UserWarning):
    """None of a problem's candidates could be timed, so the cost model chooses for the problem."""


class Records(Protocol):
    """A place where records are looked up."""

    def find(self, problem: Problem, here: Fingerprint) -> Record | None: ...


class Tuner:
    """Fills the records of its `selector` for the problems it is given.

    name: the name of the selector. store: where records are found and, if it is a RecordStore,
    written. budget: the seconds to spend on measuring in all; 0 measures nothing. each: the seconds
    of timing one problem, and problems with a single candidate are not timed; None times every
    problem for its share of the budget. again: whether to measure problems that have a record too.
    `measurements` counts the problems measured.
    """

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
        self._isolated = IsolatedMeasurement()
        self._lock = threading.Lock()

    def ensure(
        self,
        problems: Iterable[Problem],
        on_record: Callable[[Problem, Choice | None], None] = lambda problem, choice: None,
    ) -> None:
        """Find or measure a choice for each problem, in order, while the budget lasts.

        The cost model chooses for the problems that are not reached. on_record: called with each
        problem and its recorded choice, or None.

        Raises NoCorrectVariantError if no candidate gives right results for a problem.
        """
        waiting = list(dict.fromkeys(problems))
        with self._lock:
            try:
                while waiting:
                    problem = waiting.pop(0)
                    known = self.selector.recorded(problem) or problem in self._modelled
                    if self.again or not known:
                        self._ensure(problem, 1 + len(waiting))
                    on_record(problem, self.selector.recorded(problem))
            finally:
                self._isolated.close()

    def ensure_calls(self, calls: Iterable[tuple[Problem, bool]]) -> None:
        """Do as `ensure` for the problems of calls, each given as (forward problem, whether it
        trains)."""
        calls = dict.fromkeys(calls)
        if self.budget > 0 and any(forward.device == "cpu" for forward, _ in calls):
            self._use_measured_cpu()
        self.ensure(
            problem
            for forward, trains in calls
            for problem in self.selector.problems_to_measure(forward, trains=trains)
        )

    def refresh(self, budget: float) -> None:
        """Set a new budget, and try problems again that an earlier budget did not reach."""
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

        Does nothing while a backward is under way.
        """
        if not _in_backward():
            self.ensure(self.selector.take_misses())

    def _ensure(self, problem: Problem, remaining: int) -> None:
        here = fingerprint(problem.device)
        choice = self._found(problem, here)
        # Do not measure during a recomputation: it must match the first forward.
        if self.budget > 0 and (choice is None or self.again) and not _in_backward():
            seconds = self.budget / remaining
            start = time.monotonic()
            with self._turn(problem, here) as mine:
                if not self.again:
                    choice = self._found(problem, here)
                if mine and (choice is None or self.again):
                    choice = self._measure(problem, here, seconds) or choice
            self.budget -= time.monotonic() - start
        if choice is None:
            self._modelled.add(problem)
        else:
            self.selector.remember(problem, choice)

    def _found(self, problem: Problem, here: Fingerprint | None) -> Choice | None:
        record = None if here is None else self.store.find(problem, here)
        return None if record is None else choice_of(problem, record)

    @contextlib.contextmanager
    def _turn(self, problem: Problem, here: Fingerprint | None) -> Iterator[bool]:
        """Yield whether this process may measure.

        The ranks of a job take turns; all but the first then find what the first has measured.
        """
        if here is None or not isinstance(self.store, RecordStore):
            yield True
        else:
            with self.store.exclusive(problem, here, timeout=self.budget) as mine:
                yield mine

    def _measure(self, problem: Problem, here: Fingerprint | None, seconds: float) -> Choice | None:
        if problem.device == "cpu":
            self._use_measured_cpu()
        timings = self._timings(problem, seconds if self.each is None else min(self.each, seconds))
        if timings is None:
            return None
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
        model = measured_cpu(self.store.folder if isinstance(self.store, RecordStore) else None)
        if model is not None:
            self.selector.use_cpu(model)

    def _timings(self, problem: Problem, seconds: float) -> Timings | None:
        """Time a handful of candidates, and further ones only while none gives right results.

        Returns None if there is only one candidate, or if none could run. Raises
        NoCorrectVariantError if all ran and all gave wrong results.
        """
        ranked = selection.candidates(problem, model_for(problem.device, self.selector.cpu))
        rejected: dict[str, str] = {}
        while ranked:
            tried = selection.shortlist(ranked, problem)
            if self.each is not None and len(tried) == 1 and not rejected:
                return None  # A single candidate: there is no choice to make.
            ranked = [choice for choice in ranked if choice not in tried]
            try:
                result = self._run(problem, tried, seconds)
            except TuningProcessError as error:
                self.budget = 0.0
                rejected |= dict.fromkeys((choice.name for choice in tried), str(error))
                break
            for index, reason in result.rejected.items():
                rejected[tried[index].name] = reason
                if reason.startswith(WRONG):
                    message = f"{tried[index].name} is not used, {reason}, for {problem}"
                    warnings.warn(message, WrongResultWarning, stacklevel=2)
            if result.seconds:
                timed = {tried[i]: _timing(tried[i], result, i) for i in result.ranking}
                baselines = (t for c, t in timed.items() if selection.is_standard(c, problem))
                return Timings(
                    tuple(timed.values()), next(baselines, None), tuple(rejected.items())
                )
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in rejected.items())
        wrong = [name for name, reason in rejected.items() if reason.startswith(WRONG)]
        if len(wrong) == len(rejected):
            raise NoCorrectVariantError(problem=problem, reasons=reasons)
        # Exclude only candidates with wrong results. Those that ran out of memory here, beside the
        # operands of the measurement, may have enough memory in the call itself.
        self.selector.exclude(problem, wrong)
        message = f"{problem} is chosen by the cost model, no candidate could be timed:\n{reasons}"
        warnings.warn(message, NotMeasuredWarning, stacklevel=2)
        return None

    def _run(self, problem: Problem, tried: list[Choice], seconds: float) -> Measurement:
        if not any(choice.variant.isolated for choice in tried):
            return measure(problem, tried, seconds)
        if torch.cuda.is_initialized():
            # The other process needs the memory that this one has cached and does not use.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        limit = min(_LONGEST_RUN, max(_SHORTEST_LIMIT, self.budget))
        return self._isolated.measure(problem, tried, seconds, limit)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _timing(choice: Choice, result: Measurement, index: int) -> Timing:
    median, spread = result.median(index), result.spread(index)
    return Timing(choice.variant.name, choice.config.label, median, spread)


def choice_of(problem: Problem, timings: Timings) -> Choice | None:
    """Return the fastest candidate as a choice; None if this version does not offer it for
    `problem`."""
    winner = timings.winner
    for variant in registry.VARIANTS:
        if variant.name != winner.variant or variant.rejects(problem):
            continue
        for config in variant.configs(problem):
            if config.label == winner.config:
                second = timings.runner_up
                measured = Measured(
                    gain=timings.gain,
                    runner_up=second and f"{second.variant} {second.config}",
                    margin=timings.margin,
                )
                return Choice(variant, config, winner.seconds, measured)
    return None
