"""Tuner: sees to it that problems have a measured choice, found in records or measured now."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from qlora_compile.kernels import registry, selection
from qlora_compile.kernels.device_model import device_model
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.selection import Choice, Measured
from qlora_compile.problem import Problem
from qlora_compile.tuning.correctness import WRONG
from qlora_compile.tuning.cpu_figures import use_measured_cpu
from qlora_compile.tuning.errors import NoCorrectVariantError
from qlora_compile.tuning.files import read_lines, records_of
from qlora_compile.tuning.fingerprint import Fingerprint, fingerprint
from qlora_compile.tuning.isolated import IsolatedMeasurement
from qlora_compile.tuning.measure import Measurement, measure
from qlora_compile.tuning.record import Record, Timing, portable, utc_now
from qlora_compile.tuning.store import RecordStore

logger = logging.getLogger(__name__)

AUTO_BUDGET = 60.0
"""Seconds that one model's problems may take to measure without anyone asking for it."""

_SECONDS_EACH = 1.0
"""Of timing one problem where the budget does not allow for more or less."""

_WAIT = 180.0
"""Seconds to wait for another process that measures the same problem."""


class WrongResultWarning(UserWarning):
    """A variant computed wrong numbers and will not be chosen: a bug of this package."""


class NotMeasuredWarning(UserWarning):
    """None of a problem's candidates could be timed; it stays modelled."""


class Records(Protocol):
    """Where records are looked up."""

    def find(self, problem: Problem, fingerprint: Fingerprint) -> Record | None: ...


class RecordFile:
    """The records of one file, as `qlora-compile records export` writes it."""

    def __init__(self, path: Path) -> None:
        self._records = {record.key: record for record in records_of(read_lines(path))}

    def find(self, problem: Problem, fingerprint: Fingerprint) -> Record | None:
        return self._records.get((portable(problem), fingerprint))


class Tuner:
    """Fills the records of `source` (see kernels/selection.py) for the problems it is given.

    store: where records are found and, if it is a RecordStore, kept. budget: seconds it may spend
    measuring in all; 0 measures nothing. each: seconds of timing one problem, None for its share of
    the budget. again: measures also what has a record. `measurements` counts the problems measured.
    """

    def __init__(
        self,
        source: str,
        store: Records,
        budget: float,
        *,
        each: float | None = _SECONDS_EACH,
        again: bool = False,
    ) -> None:
        self.source = source
        self.store = store
        self.budget = budget
        self.each = each
        self.again = again
        self.measurements = 0
        self._modelled: set[Problem] = set()
        self._isolated = IsolatedMeasurement()

    def ensure(
        self,
        problems: Iterable[Problem],
        on_record: Callable[[Problem, Choice | None], None] = lambda problem, choice: None,
    ) -> None:
        """Finds or measures a choice for each problem; those the budget does not reach stay
        modelled. on_record is told of each.

        Raises NoCorrectVariantError where no candidate gives right results.
        """
        left = list(dict.fromkeys(problems))
        try:
            while left:
                problem = left.pop(0)
                known = selection.recorded(self.source, problem) or problem in self._modelled
                if self.again or not known:
                    self._ensure(problem, 1 + len(left))
                on_record(problem, selection.recorded(self.source, problem))
        finally:
            self._isolated.close()

    def refresh(self, budget: float) -> None:
        """Gives a new budget, also to what an earlier one did not reach."""
        self.budget = budget
        self._modelled.clear()

    def ensure_missed(self) -> None:
        """What calls have asked for and nobody had measured, unless autograd is waiting for us."""
        if torch._C._current_graph_task_id() == -1:
            self.ensure(selection.take_missed(self.source))

    def _ensure(self, problem: Problem, remaining: int) -> None:
        here = fingerprint(problem.device)
        choice = self._found(problem, here)
        if self.budget > 0 and (choice is None or self.again):
            with self._turn(problem, here) as mine:
                if not self.again:
                    choice = self._found(problem, here)
                if mine and (choice is None or self.again):
                    choice = self._measure(problem, here, remaining)
        if choice is None:
            self._modelled.add(problem)
        else:
            selection.remember(self.source, problem, choice)

    def _found(self, problem: Problem, here: Fingerprint | None) -> Choice | None:
        record = None if here is None else self.store.find(problem, here)
        return None if record is None else choice_of(problem, record)

    @contextlib.contextmanager
    def _turn(self, problem: Problem, here: Fingerprint | None) -> Iterator[bool]:
        """Whether this process may measure: the ranks of a job take turns, and all but the first
        find what it measured."""
        if here is None or not isinstance(self.store, RecordStore):
            yield True
        else:
            with self.store.exclusive(problem, here, timeout=_WAIT) as mine:
                yield mine

    def _measure(self, problem: Problem, here: Fingerprint | None, remaining: int) -> Choice | None:
        start = time.monotonic()
        each = self.budget / remaining
        seconds = each if self.each is None else min(self.each, each)
        if problem.device == "cpu":
            use_measured_cpu(self.store.folder if isinstance(self.store, RecordStore) else None)
        measured = self._timings(problem, seconds)
        self.budget -= time.monotonic() - start
        if measured is None:
            return None
        self.measurements += 1
        if here is not None and isinstance(self.store, RecordStore):
            self.store.append(
                Record(
                    problem=portable(problem),
                    fingerprint=here,
                    timings=measured.timings,
                    baseline=measured.baseline,
                    rejected=measured.rejected,
                    measured_at=utc_now(),
                )
            )
        choice = choice_of(problem, measured)
        assert choice is not None
        logger.info("measured %s for %s", choice.name, problem)
        return choice

    def _timings(self, problem: Problem, seconds: float) -> Timings | None:
        """Of a handful of candidates, and of more only while none of them is right; None where
        none could run."""
        ranked = selection.candidates(
            problem, device_model(problem.device, target_of(problem.device))
        )
        rejected: dict[str, str] = {}
        while ranked:
            tried = selection.shortlist(ranked, problem)
            ranked = [choice for choice in ranked if choice not in tried]
            isolated = any(choice.variant.isolated for choice in tried)
            if isolated and torch.cuda.is_initialized():
                # The other process needs what this one holds without using it.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            run = self._isolated.measure if isolated else measure
            result = run(problem, tried, seconds)
            for index, reason in result.rejected.items():
                rejected[tried[index].name] = reason
                if reason.startswith(WRONG):
                    message = f"{tried[index].name} is not used, {reason}, for {problem}"
                    warnings.warn(message, WrongResultWarning, stacklevel=2)
            if result.seconds:
                timings = {tried[i]: _timing(tried[i], result, i) for i in result.ranking}
                baselines = (t for c, t in timings.items() if selection.is_standard(c, problem))
                return Timings(
                    tuple(timings.values()), next(baselines, None), tuple(rejected.items())
                )
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in rejected.items())
        if any(reason.startswith(WRONG) for reason in rejected.values()):
            raise NoCorrectVariantError(problem=problem, reasons=reasons)
        # Memory that is short now, beside what is measured, may do for the call itself.
        message = f"{problem} is chosen by the cost model, no candidate could be timed:\n{reasons}"
        warnings.warn(message, NotMeasuredWarning, stacklevel=2)
        return None


@dataclass(frozen=True)
class Timings:
    """What was measured of a problem: of the candidates that were right, fastest first, of *dense*
    in its standard config, and why others were not timed."""

    timings: tuple[Timing, ...]
    baseline: Timing | None
    rejected: tuple[tuple[str, str], ...]


def _timing(choice: Choice, result: Measurement, index: int) -> Timing:
    median, spread = result.median(index), result.spread(index)
    return Timing(choice.variant.name, choice.config.label, median, spread)


def choice_of(problem: Problem, measured: Timings | Record) -> Choice | None:
    """The fastest as a choice; None where this version does not offer it for `problem`."""
    winner, *others = measured.timings
    for variant in registry.VARIANTS:
        if variant.name != winner.variant or variant.rejects(problem):
            continue
        for config in variant.configs(problem):
            if config.label == winner.config:
                baseline, second = measured.baseline, others[0] if others else None
                return Choice(
                    variant,
                    config,
                    winner.seconds,
                    Measured(
                        gain=None if baseline is None else baseline.seconds / winner.seconds,
                        runner_up=second and f"{second.variant} {second.config}",
                        margin=second and second.seconds / winner.seconds,
                    ),
                )
    return None
