"""A simulated machine: candidates have true times, noise is added, and a clock counts both.

It stands in for `measure` and for `time` in the tuner, so that tests of noise are deterministic.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.tuning.judgement import Measurement
from qlora_compile.tuning.load import Load, spread_and_drift
from qlora_compile.tuning.rounds import run_rounds


@dataclass(frozen=True)
class Noise:
    """What is added to true times.

    jitter: standard deviation of the logarithm of each time. tail: the chance that a run takes
    `tail_factor` times as long. drift: how many times as slow the machine is after a second, when
    it stays so. burst: the chance that a burst begins with a run; all runs of the next
    `burst_seconds` take `burst_factor` times as long.
    """

    jitter: float = 0.01
    tail: float = 0.0
    tail_factor: float = 10.0
    drift: float = 1.0
    burst: float = 0.0
    burst_seconds: float = 0.05
    burst_factor: float = 5.0


QUIET = Noise()


@dataclass
class Machine:
    """A simulated machine. now: its clock. busy: how much other work slows each candidate's runs,
    by name; empty for none. counted: whether the system tells of other work, unlike on a GPU."""

    seed: int
    noise: Noise = QUIET
    busy: Mapping[str, float] = field(default_factory=dict)
    counted: bool = True
    now: float = 0.0
    slept: float = 0.0
    measured: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._burst_ends = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds

    def run(self, name: str, seconds: float) -> float:
        """Return the time that a run takes which truly takes `seconds`."""
        noise, drawn = self.noise, self._random
        if drawn.random() < noise.burst:
            self._burst_ends = self.now + noise.burst_seconds
        taken = (
            seconds * drawn.lognormvariate(0.0, noise.jitter) * noise.drift ** min(self.now, 1.0)
        )
        if drawn.random() < noise.tail:
            taken *= noise.tail_factor
        if self.now < self._burst_ends:
            taken *= noise.burst_factor
        taken *= self.busy.get(name, 1.0)
        self.now += taken
        return taken

    def measurement(self, names: Sequence[str], seconds: Sequence[float], limit: float):
        """What measuring candidates that truly take `seconds` results in."""
        self.measured += 1

        def time_one(index: int, turn: int) -> float:
            return self.run(names[index], seconds[index])

        result = Measurement({index: [time_one(index, 0)] for index in range(len(names))})
        run_rounds(result.seconds, time_one, limit, self.monotonic)
        spread, drift = spread_and_drift(result.rounds)
        others = (1.8 if self.busy else 0.02) if self.counted else None
        result.load = replace(Load(others=others), spread=spread, drift=drift)
        return result

    def measure(self, problem: Problem, tried: Sequence[Choice], limit: float) -> Measurement:
        """Replace `measure.measure`."""
        seconds = [true_seconds(problem, choice) for choice in tried]
        return self.measurement([choice.name for choice in tried], seconds, limit)


def true_seconds(problem: Problem, choice: Choice) -> float:
    """Return the true time of a choice as the cost model gives it: by up to 1.6 times more or
    less."""
    return choice.seconds * 1.6 ** random.Random(f"{problem} {choice.name}").uniform(-1, 1)
