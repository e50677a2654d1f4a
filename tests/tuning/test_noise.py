"""What a measurement decides under noise and other work, on a simulated machine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_compile.kernels import selection
from qlora_compile.kernels.device_model import CPU
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice, candidates, shortlist
from qlora_compile.kernels.selector import select
from qlora_compile.report import Chosen, _chooser
from qlora_compile.tuning import trials
from qlora_compile.tuning import tuner as module
from qlora_compile.tuning.caution import CAREFUL
from qlora_compile.tuning.judgement import Doubt, Measurement, Trial, judge
from qlora_compile.tuning.load import Load, spread_and_drift
from qlora_compile.tuning.rounds import (
    CONFIDENCE,
    FEWEST_PAIRS,
    WATCHED,
    interval_of_median,
    run_rounds,
)
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.timings import Timings
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.tuning.warning import NotMeasuredWarning
from tests.tuning.records import real_problem
from tests.tuning.simulated import QUIET, Machine, Noise, true_seconds

PROBLEM = real_problem(m=256)
TRIED = shortlist(candidates(PROBLEM, CPU), PROBLEM)

UNITS = (1e-4, 3e-3, 5e-2)


def drawn_noise(drawn: random.Random) -> Noise:
    """Return a noise of jitter alone, or one of every kind at once."""
    jitter = Noise(jitter=drawn.uniform(0.0, 0.5))
    if drawn.random() < 0.5:
        return jitter
    return replace(
        jitter,
        tail=drawn.uniform(0.0, 0.4),
        tail_factor=drawn.uniform(1.0, 100.0),
        drift=drawn.uniform(0.1, 10.0),
        burst=drawn.uniform(0.0, 0.1),
        burst_seconds=drawn.uniform(0.001, 1.0),
        burst_factor=drawn.uniform(1.0, 20.0),
    )


def judged(machine: Machine, seconds: Sequence[float], limit: float = 0.3) -> Timings | Doubt:
    """Return what a measurement of these true times decides; the model expects equal ones."""
    tried = [replace(choice, seconds=1.0) for choice in TRIED]
    names = [choice.name for choice in tried]
    return judge(Trial(PROBLEM, tried, machine.measurement(names, seconds, limit), {}), CAREFUL)


def scaled(unit: float, factor: float) -> list[float]:
    """Return times: `unit` for the cost model's choice, `factor` times that for the others."""
    return [unit] + [unit * factor] * (len(TRIED) - 1)


def test_noise_alone_seldom_makes_something_slower_the_choice() -> None:
    """On a GPU, where the system tells of no other work. The rate is small and not zero: every
    interval misses with 1 - CONFIDENCE. Hypothesis would look for the few misses, and find them."""
    drawn, wrong, count = random.Random(0), 0, 600
    for seed in range(count):
        machine = Machine(seed, drawn_noise(drawn), counted=False)
        times = scaled(drawn.choice(UNITS), drawn.choice([1.05, 1.125, drawn.uniform(1.05, 3.0)]))
        result = judged(machine, times)
        wrong += isinstance(result, Timings) and result.advantage is not None
    assert wrong <= (1 - CONFIDENCE) * count


@pytest.mark.parametrize("seed", range(20))
def test_what_is_faster_is_chosen_on_a_quiet_machine(seed: int) -> None:
    drawn = random.Random(seed)
    jitter, factor, unit = drawn.uniform(0.0, 0.05), drawn.uniform(1.2, 1.9), drawn.choice(UNITS)
    seconds = scaled(unit, 1.5)
    seconds[2] = unit / factor
    result = judged(Machine(seed, Noise(jitter=jitter)), seconds)
    assert isinstance(result, Timings)
    assert (result.winner.variant, result.winner.config) == _label(TRIED[2])
    found = result.advantage
    assert found is not None
    assert found.over == TRIED[0].name
    assert 1 < found.low <= factor * 1.1
    assert found.high >= factor / 1.1
    assert found.rounds >= FEWEST_PAIRS
    assert result.load.disturbance(CAREFUL) is None


def _label(choice: Choice) -> tuple[str, str]:
    return choice.variant.name, choice.config.label


def test_what_the_rounds_do_not_show_is_not_chosen() -> None:
    """As fast as the model's choice, but for luck."""
    for seed in range(20):
        result = judged(Machine(seed, Noise(jitter=0.02)), scaled(3e-3, 1.0))
        assert isinstance(result, Timings)
        assert result.advantage is None
        assert (result.winner.variant, result.winner.config) == _label(TRIED[0])


def test_long_candidates_take_no_more_rounds_than_it_needs_to_know() -> None:
    taken: dict[int, int] = {}

    def time_one(index: int, turn: int) -> float:
        taken[index] = taken.get(index, 0) + 1
        return [10.0, 11.0, 30.0, 9.0][index]

    clock = iter(range(0, 10_000, 100))
    run_rounds({i: [time_one(i, 0)] for i in range(4)}, time_one, 0.3, lambda: next(clock))
    assert taken == {0: 1 + FEWEST_PAIRS, 1: 3, 2: 2, 3: 1 + FEWEST_PAIRS}


def test_a_candidate_left_alone_is_timed_while_the_counters_watch() -> None:
    machine = Machine(0)
    seconds = {i: [machine.run("", 1e-3 * 9**i)] for i in range(3)}
    start = machine.now
    run_rounds(
        seconds,
        lambda index, turn: machine.run("", 1e-3 * 9**index),
        0.3,
        machine.monotonic,
        watch=WATCHED,
    )
    assert [len(seconds[i]) for i in (1, 2)] == [2, 2]
    assert WATCHED <= machine.now - start < WATCHED + 0.01


@given(st.lists(st.floats(0.1, 10.0), max_size=400))
def test_the_interval_holds_the_sample_median(values: list[float]) -> None:
    found = interval_of_median(values)
    assert (found is None) == (len(values) < FEWEST_PAIRS)
    if found is not None:
        low, high = found
        below, above = sum(v < low for v in values), sum(v > high for v in values)
        assert below <= len(values) / 2
        assert above <= len(values) / 2
        assert low in values
        assert high in values


@pytest.mark.parametrize("count", [8, 20, 40, 400])
def test_the_interval_is_as_sure_as_it_says(count: int) -> None:
    """By the binomial distribution: values lie above or below the median as coins fall."""
    low, high = interval_of_median([float(i) for i in range(count)]) or (0.0, 0.0)
    outside = sum(math.comb(count, k) for k in range(int(low) + 1)) * 2 / 2**count
    assert outside <= 0.01
    further = sum(math.comb(count, k) for k in range(int(low) + 2)) * 2 / 2**count
    assert further > 0.01
    assert high == count - 1 - low


def test_spread_and_drift_are_of_what_all_candidates_share() -> None:
    assert spread_and_drift([]) == spread_and_drift([[1.0]]) == (0.0, 1.0)
    steady = [[1.0] * 8, [3.0] * 8]
    assert spread_and_drift(steady) == (0.0, 1.0)
    slower = [[1.0] * 4 + [2.0] * 4, [3.0] * 4 + [6.0] * 4]
    assert spread_and_drift(slower)[1] == pytest.approx(2.0)
    assert spread_and_drift([each[::-1] for each in slower])[1] == pytest.approx(2.0)
    assert spread_and_drift([[1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0]])[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (Load(others=1.8), "other processes used 1.8 CPUs"),
        (Load(stolen=0.2), "the hypervisor took 20% of the CPUs"),
        (Load(preemptions=250.0), "this process was preempted 250 times a second"),
        (Load(drift=2.5), "its speed changed by a factor of 2.5"),
        (Load(spread=0.9), "its speed varied by 90%"),
        (Load(0.1, 1.1, 0.1, 0.01, 20.0), None),
        (Load(others=0.1, preemptions=250.0), None),
        (Load(), None),
    ],
)
def test_a_disturbance_is_told(load: Load, told: str | None) -> None:
    assert load.disturbance(CAREFUL) == told
    # An undisturbed measurement of the same counts.
    result = Measurement({0: [1.0] * 12, 1: [0.9] * 12}, load=load)
    judgement = judge(Trial(PROBLEM, TRIED, result, {}), replace(CAREFUL, reversal=math.inf))
    assert isinstance(judgement, Doubt) == (told is not None)


class TestTuner:
    """Tuners on a simulated machine, which slows each candidate by another factor while busy."""

    PROBLEMS = tuple(
        real_problem(m=m, layout=PROBLEM.layout.with_rows(n), direction=direction)
        for m in (64, 1024)
        for n in (24, 192)
        for direction in ("forward", "backward")
    )

    @pytest.fixture
    def tuned(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> Callable[[Machine, str], Tuner]:
        monkeypatch.setattr(module, "measured_cpu", lambda folder, caution: None)

        def tune(machine: Machine, folder: str) -> Tuner:
            monkeypatch.setattr(trials, "measure", machine.measure)
            monkeypatch.setattr(module, "time", machine)
            tuner = Tuner("noise", RecordStore(tmp_path / folder), 60.0)
            tuner.caution = CAREFUL
            tuner.ensure(self.PROBLEMS)
            return tuner

        return tune

    def busy(self, seed: int) -> dict[str, float]:
        """Return other work that most slows candidates which wait for all threads."""
        names = {choice.name for p in self.PROBLEMS for choice in candidates(p, CPU)}
        return {name: 1.0 + (seed + 7 * i) % 12 for i, name in enumerate(sorted(names))}

    def step(self, tuner: Tuner) -> float:
        """Return the true time of all chosen candidates."""
        total = 0.0
        for problem in self.PROBLEMS:
            name = tuner.selector.look_up(problem).name
            [choice] = [c for c in candidates(problem, CPU) if c.name == name]
            total += true_seconds(problem, choice)
        return total

    @pytest.mark.parametrize("seed", range(10))
    def test_beside_other_work_nothing_slower_is_recorded(
        self, tuned: Callable[[Machine, str], Tuner], tmp_path: Path, seed: int
    ) -> None:
        """Tuned beside other work, then run quietly."""
        quiet = tuned(Machine(seed), "quiet")
        assert quiet.measurements == len(self.PROBLEMS)
        with pytest.warns(NotMeasuredWarning, match="the machine was busy, other processes used"):
            noisy = tuned(Machine(seed, busy=self.busy(seed)), "noisy")
        assert noisy.measurements == 0
        assert RecordStore(tmp_path / "noisy").read() == {}
        for problem in self.PROBLEMS:
            assert noisy.selector.look_up(problem) == select(problem)
            chosen = Chosen.of(problem, noisy.selector)
            assert _chooser(chosen).startswith("cost model, not measured: the machine was busy")
        later = tuned(Machine(seed + 1), "noisy")
        assert later.measurements == len(self.PROBLEMS)
        assert self.step(later) <= 1.05 * self.step(quiet)
        assert self.step(quiet) < self.step(noisy)

    def test_a_busy_machine_costs_little_time(self, tuned: Callable[[Machine, str], Tuner]) -> None:
        machine = Machine(0, busy=self.busy(0))
        with pytest.warns(NotMeasuredWarning):
            tuner = tuned(machine, "noisy")
        assert machine.measured == module._GIVE_UP
        assert 60.0 - tuner.budget == pytest.approx(machine.now)
        # Every problem is told why, also those that were not reached.
        assert all(tuner.selector.unmeasured(problem) for problem in self.PROBLEMS)

    def test_other_work_that_ends_costs_no_record(
        self, tuned: Callable[[Machine, str], Tuner]
    ) -> None:
        class Burst(Machine):
            def measure(self, problem: Problem, tried: Sequence[Choice], limit: float):
                self.busy = {} if self.measured >= 3 else {choice.name: 3.0 for choice in tried}
                return super().measure(problem, tried, limit)

        machine = Burst(3)
        tuner = tuned(machine, "noisy")
        assert tuner.measurements == len(self.PROBLEMS)
        assert self.step(tuner) <= 1.05 * self.step(tuned(Machine(3), "quiet"))

    def test_a_gain_that_the_model_denies_is_measured_twice(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tuned: Callable[[Machine, str], Tuner],
        tmp_path: Path,
    ) -> None:
        """The system does not tell of the other work, which slows all candidates but one."""
        seen: list[Problem] = []
        problem = self.PROBLEMS[0]
        lucky = shortlist(candidates(problem, CPU), problem)[1].name

        class Misled(Machine):
            def measure(self, problem: Problem, tried: Sequence[Choice], limit: float):
                seen.append(problem)
                first = len(seen) == 1
                slowed = {c.name: 21.0 for c in tried if first and c.name != lucky}
                self.busy, self.counted = slowed, False
                return super().measure(problem, tried, limit)

        tuner = tuned(Misled(1), "noisy")
        quiet = tuned(Machine(2), "quiet")
        # Once more, after all the others.
        assert seen[0] == problem
        assert seen.count(problem) == 2
        assert seen.index(problem, 1) >= len(self.PROBLEMS)
        assert tuner.selector.look_up(problem).name == quiet.selector.look_up(problem).name
        gains = [record.gain for record in RecordStore(tmp_path / "noisy").read().values()]
        assert max(gain or 0.0 for gain in gains) < 3

    def test_a_great_gain_that_is_confirmed_counts(
        self, monkeypatch: pytest.MonkeyPatch, tuned: Callable[[Machine, str], Tuner]
    ) -> None:
        name = shortlist(candidates(self.PROBLEMS[0], CPU), self.PROBLEMS[0])[1].name
        slowed = {c.name: 9.0 for p in self.PROBLEMS for c in candidates(p, CPU) if c.name != name}
        machine = Machine(1, busy=slowed, counted=False)
        tuner = tuned(machine, "cache")
        choice = tuner.selector.recorded(self.PROBLEMS[0])
        assert choice is not None
        assert choice.name == name
        assert machine.measured > len(self.PROBLEMS)
        assert machine.slept < 1.0

    def test_what_is_never_confirmed_is_left_to_the_model(
        self, monkeypatch: pytest.MonkeyPatch, tuned: Callable[[Machine, str], Tuner]
    ) -> None:
        """Each time another candidate seems to be many times as fast."""

        class Fickle(Machine):
            def measure(self, problem: Problem, tried: Sequence[Choice], limit: float):
                lucky = tried[1 + self.measured % 2].name
                self.busy = {c.name: 21.0 for c in tried if c.name != lucky}
                self.counted = False
                return super().measure(problem, tried, limit)

        monkeypatch.setattr(TestTuner, "PROBLEMS", self.PROBLEMS[:1])
        machine = Fickle(0)
        with pytest.warns(NotMeasuredWarning, match="seemed .* which no second measurement"):
            tuner = tuned(machine, "cache")
        assert machine.measured == CAREFUL.runs
        assert machine.slept > 0
        assert tuner.measurements == 0
        assert tuner.selector.look_up(self.PROBLEMS[0]) == select(self.PROBLEMS[0])

    def test_measuring_again_keeps_the_record_where_the_machine_is_busy(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(module, "measured_cpu", lambda folder, caution: None)
        store = RecordStore(tmp_path)
        for machine, again in ((Machine(0), False), (Machine(0, busy=self.busy(0)), True)):
            monkeypatch.setattr(trials, "measure", machine.measure)
            monkeypatch.setattr(module, "time", machine)
            before = store.read()
            tuner = Tuner("again", store, 60.0, each=None, again=again)
            tuner.caution = CAREFUL
            if again:
                with pytest.warns(NotMeasuredWarning, match="busy"):
                    tuner.ensure(self.PROBLEMS)
                assert store.read() == before
                assert all(tuner.selector.recorded(problem) for problem in self.PROBLEMS)
                # A budget that was asked for is spent on trying.
                assert machine.measured > module._GIVE_UP
            else:
                tuner.ensure(self.PROBLEMS)
        assert len(before) == len(self.PROBLEMS)


def test_a_wrong_candidate_is_not_modelled_where_no_measurement_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "measured_cpu", lambda folder, caution: None)
    machine = Machine(0, QUIET, busy={"any": 1.0})
    modelled = select(PROBLEM)

    def measure(problem: Problem, tried: Sequence[Choice], limit: float) -> Measurement:
        result = machine.measure(problem, tried, limit)
        del result.seconds[0]
        result.rejected[0] = "wrong result: y is off by 1"
        return result

    monkeypatch.setattr(trials, "measure", measure)
    monkeypatch.setattr(module, "time", machine)
    tuner = Tuner("wrong", RecordStore(tmp_path), 60.0)
    tuner.caution = CAREFUL
    with pytest.warns(NotMeasuredWarning, match="busy"), pytest.warns(UserWarning, match="wrong"):
        tuner.ensure([PROBLEM])
    assert RecordStore(tmp_path).read() == {}
    assert tuner.selector.look_up(PROBLEM).name != modelled.name
    assert selection.candidates(PROBLEM, CPU)[0].name == modelled.name
