"""Selector: answers which variant solves a Problem, by measurements or else by the cost model.

A Call carries the name of its selector, so that models with different records run side by side.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection
from dataclasses import replace
from weakref import WeakValueDictionary

import torch

from qlora_compile.kernels.call_times import CallTimes, Contradiction
from qlora_compile.kernels.device_model import CPU, CpuModel
from qlora_compile.kernels.plans import native as plans
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import (
    Choice,
    model_for,
    modelled,
    problems_of_call,
    saving_is_faster,
)

MODELLED = ""
"""The name, in a Call, for variants that the cost model chooses."""

_Key = tuple[Problem, int]
_UNTIMED: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class ModelledSelector:
    """Chooses by the cost model alone; without state, and so the same on every run."""

    name = MODELLED

    def select(self, problem: Problem) -> Choice:
        """Return the choice for `problem`, for a call that is about to run."""
        return self.look_up(problem)

    def look_up(self, problem: Problem) -> Choice:
        """Do as `select`, without recording a miss."""
        return self.recorded(problem) or self._modelled(problem)

    def recorded(self, problem: Problem) -> Choice | None:
        """Return the measured choice; None without one."""
        return None

    def timing(
        self, problem: Problem, choice: Choice, rows: int | None
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context to run `choice` in, which sometimes times the run. rows: the call's;
        None if the run computes less than was measured."""
        return _UNTIMED

    def unmeasured(self, problem: Problem) -> str | None:
        """Return why no measurement of `problem` counts; None if none was tried, or one counts."""
        return None

    def saves_low_rank(self, forward: Problem) -> bool:
        """Whether the forward should save S for its backward, instead of computing S twice."""
        return self.prefers_saving(forward)

    def prefers_saving(self, forward: Problem) -> bool:
        """Do as `saves_low_rank`, without binding later calls to the answer."""
        if not forward.rank:
            return False
        problems = problems_of_call(forward, trains=True)
        # Measured seconds are compared with measured ones only.
        choices = [self.recorded(each) for each in problems]
        if None in choices:
            choices = [self._modelled(each) for each in problems]
        return saving_is_faster(problems, [choice.seconds for choice in choices if choice])

    def _modelled(self, problem: Problem) -> Choice:
        return modelled(problem, model_for(problem.device, CPU), frozenset())


class Selector(ModelledSelector):
    """Chooses what was recorded for a problem, else by the cost model.

    It owns the records, the problems without a record (misses), the candidates that gave wrong
    results (exclusions), the decisions about S, and the times of real calls. Its tuner owns it, and
    Calls find it by `name` as long as it lives. generation: a number that changes whenever a choice
    may have changed.
    """

    def __init__(self, name: str) -> None:
        """Take `name`, or name-2, name-3, … if a living selector has it."""
        self.generation = 0
        self.cpu = CPU
        self._records: dict[_Key, Choice] = {}
        self._misses: dict[Problem, None] = {}
        self._exclusions: dict[_Key, frozenset[str]] = {}
        self._unmeasured: dict[_Key, str] = {}
        self._times = CallTimes()
        self._saves_low_rank: dict[Problem, bool] = {}
        with _naming:
            names = (name, *(f"{name}-{number}" for number in range(2, 2 + len(_selectors))))
            self.name = next(each for each in names if each not in _selectors)
            _selectors[self.name] = self
        # The cost model chose for the calls that name this selector, if any did.
        plans.forget()

    def select(self, problem: Problem) -> Choice:
        if self.recorded(problem) is None:
            self._misses[problem] = None
        return self.look_up(problem)

    def recorded(self, problem: Problem) -> Choice | None:
        return self._records.get(_key(problem))

    def saves_low_rank(self, forward: Problem) -> bool:
        """Answer once for all: a checkpoint's recomputation must save what its forward saved."""
        decided = self.prefers_saving(forward)
        return self._saves_low_rank.setdefault(_without_decision(forward), decided)

    def prefers_saving(self, forward: Problem) -> bool:
        decided = self._saves_low_rank.get(_without_decision(forward))
        return super().prefers_saving(forward) if decided is None else decided

    def problems_to_measure(self, forward: Problem, *, trains: bool) -> tuple[Problem, ...]:
        """Return the Problems of a call to measure. If, by the cost model, no forward is faster for
        not saving S, these are only the ones that save S, which spares the backward a product."""
        problems = problems_of_call(forward, trains=trains)
        saving = tuple(each for each in problems if each.keeps_low_rank)
        if saving and self._modelled(saving[0]).seconds <= self._modelled(problems[0]).seconds:
            return saving
        return problems

    def timing(
        self, problem: Problem, choice: Choice, rows: int | None
    ) -> contextlib.AbstractContextManager[None]:
        # Timing calls on a GPU would mean waiting for it.
        if rows is None or problem.device != "cpu" or not self._times.is_due():
            return _UNTIMED
        return self._times.timing(problem, choice, rows)

    def take_contradictions(self) -> dict[Problem, Contradiction]:
        """Return the problems whose records several real calls in a row contradicted, each once."""
        found = self._times.contradictions
        if found:
            self._times.contradictions = {}
        return found

    def forget(self, problem: Problem) -> None:
        """Drop the record of one problem."""
        self._records.pop(_key(problem), None)
        self._moved()

    def remember(self, problem: Problem, choice: Choice) -> None:
        """Make `choice` the answer for `problem`."""
        self._records[_key(problem)] = choice
        self._unmeasured.pop(_key(problem), None)
        self._misses.pop(problem, None)
        self._moved()

    def note_unmeasured(self, problem: Problem, reason: str) -> None:
        """Keep the reason why no measurement of `problem` counts, for reports."""
        self._unmeasured[_key(problem)] = reason

    def unmeasured(self, problem: Problem) -> str | None:
        return self._unmeasured.get(_key(problem))

    def exclude(self, problem: Problem, names: Collection[str]) -> None:
        """Keep the cost model from choosing the candidates of these names for `problem`."""
        self._exclusions[_key(problem)] = frozenset(names)
        self._moved()

    def use_cpu(self, model: CpuModel) -> None:
        """Have the cost model use these figures of the CPU from now on."""
        if model != self.cpu:
            self.cpu = model
            self._moved()

    def take_misses(self) -> list[Problem]:
        """Return the problems that `select` was asked for and has no record of, each once."""
        misses, self._misses = self._misses, {}
        return list(misses)

    def forget_records(self) -> None:
        """Drop records and misses, but not the decisions about S."""
        self._records, self._misses, self._unmeasured = {}, {}, {}
        self._moved()

    def _moved(self) -> None:
        self.generation += 1
        plans.forget()

    def _modelled(self, problem: Problem) -> Choice:
        excluded = self._exclusions.get(_key(problem), frozenset())
        return modelled(problem, model_for(problem.device, self.cpu), excluded)


def _key(problem: Problem) -> _Key:
    """Return the key of a choice; on a CPU it includes the number of threads."""
    return problem, torch.get_num_threads() if problem.device == "cpu" else 0


def _without_decision(forward: Problem) -> Problem:
    return replace(forward, keeps_low_rank=False)


_selectors: WeakValueDictionary[str, Selector] = WeakValueDictionary()
_naming = threading.Lock()
_MODELLED = ModelledSelector()


def is_known(name: str) -> bool:
    """Whether `name` stands for a selector of this process, or for the cost model."""
    return name == MODELLED or name in _selectors


def selector_named(name: str) -> ModelledSelector:
    """Return the selector of that name; the cost model for an unknown name, so that a graph which
    another process compiled, or whose tuner is gone, runs all the same."""
    return _selectors.get(name, _MODELLED)


def select(problem: Problem, records_name: str = MODELLED) -> Choice:
    """Return the choice for `problem` of the selector named `records_name`."""
    return selector_named(records_name).select(problem)
