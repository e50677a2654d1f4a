"""CallTimes: which calls are timed, and when several of them contradict a record."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_compile.kernels import call_times
from qlora_compile.kernels.call_times import OFF, SEVERAL, CallTimes
from qlora_compile.kernels.selection import Choice, Measured
from qlora_compile.kernels.selector import ModelledSelector, Selector, select
from tests.kernels.test_selection import TYPICAL

PROBLEM = replace(TYPICAL, device="cpu", m=64)
RECORDED = replace(select(PROBLEM), seconds=1.0, measured=Measured(1.0, None, None))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def after(seconds: Sequence[float], choice: Choice = RECORDED, rows: int = PROBLEM.m) -> CallTimes:
    """Return the times after calls that took so long."""
    clock = Clock()
    times = CallTimes(clock)
    for each in seconds:
        with times.timing(PROBLEM, choice, rows):
            clock.now += each
    return times


def test_several_calls_in_a_row_contradict_a_record() -> None:
    slow, fast = 2.1, 0.4
    assert not after([slow] * (SEVERAL - 1)).contradictions
    assert not after([fast] * (SEVERAL - 1)).contradictions
    assert not after([slow] * (SEVERAL - 1) + [1.0] + [slow] * (SEVERAL - 1)).contradictions
    assert not after([slow] * (SEVERAL - 1) + [fast] * (SEVERAL - 1)).contradictions
    found = after([1.0] * 3 + [slow] * SEVERAL).contradictions[PROBLEM]
    assert found.choice is RECORDED
    assert found.factor == pytest.approx(slow)
    assert after([fast] * SEVERAL).contradictions[PROBLEM].factor == pytest.approx(fast)


@given(st.lists(st.floats(1 / OFF + 0.01, OFF - 0.01), max_size=50))
def test_what_is_not_off_by_half_contradicts_nothing(seconds: list[float]) -> None:
    assert not after(seconds).contradictions


def test_fewer_rows_than_were_measured_may_take_less_time() -> None:
    assert not after([0.3] * SEVERAL, rows=PROBLEM.m // 2 + 1).contradictions
    assert after([0.2] * SEVERAL, rows=PROBLEM.m // 2 + 1).contradictions
    # Nor do they excuse a slow call.
    assert after([2.1] * SEVERAL, rows=PROBLEM.m // 2 + 1).contradictions


def test_modelled_seconds_are_not_held_to_calls() -> None:
    assert not after([99.0] * 99, choice=replace(RECORDED, measured=None)).contradictions


def test_another_choice_begins_anew() -> None:
    clock = Clock()
    times = CallTimes(clock)
    for choice in (RECORDED, replace(RECORDED, seconds=1.5)):
        for _ in range(SEVERAL - 1):
            with times.timing(PROBLEM, choice, PROBLEM.m):
                clock.now += 9.0
        assert not times.contradictions


def test_a_call_that_fails_is_not_timed() -> None:
    times = CallTimes()
    with pytest.raises(ValueError, match="no"), times.timing(PROBLEM, RECORDED, 1):
        raise ValueError("no")
    assert not times._in_a_row


@settings(max_examples=20)
@given(st.integers(1, 300))
def test_every_layer_is_timed_now_and_then(calls_of_a_step: int) -> None:
    times = CallTimes()
    count = 300 * calls_of_a_step
    due = [i for i in range(count) if times.is_due()]
    distances = {b - a for a, b in itertools.pairwise(due)}
    assert distances <= set(call_times._DISTANCES)
    assert {i % calls_of_a_step for i in due} == set(range(calls_of_a_step))


def test_a_selector_times_its_calls_on_a_cpu_alone() -> None:
    selector = Selector("timed")
    selector.remember(PROBLEM, replace(RECORDED, seconds=1e9))
    untimed = ModelledSelector().timing(PROBLEM, RECORDED, PROBLEM.m)
    on_gpu = replace(PROBLEM, device="cuda")
    for _ in range(1000):
        assert selector.timing(on_gpu, RECORDED, PROBLEM.m) is untimed
        assert selector.timing(PROBLEM, RECORDED, None) is untimed
        assert ModelledSelector().timing(PROBLEM, RECORDED, PROBLEM.m) is untimed
    assert selector.take_contradictions() == {}
    for _ in range(SEVERAL * max(call_times._DISTANCES)):
        with selector.timing(PROBLEM, selector.select(PROBLEM), PROBLEM.m):
            pass
    assert list(selector.take_contradictions()) == [PROBLEM]
    assert selector.take_contradictions() == {}
    generation = selector.generation
    selector.forget(PROBLEM)
    assert selector.generation > generation
    assert selector.select(PROBLEM) == select(PROBLEM)
    assert selector.take_misses() == [PROBLEM]
