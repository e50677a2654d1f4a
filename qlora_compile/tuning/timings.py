"""Timings: what was measured for one problem, and what was chosen by the measurement."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_compile.tuning.load import Load


@dataclass(frozen=True)
class Timing:
    """One candidate's median and interquartile range in seconds; `config` is the label."""

    variant: str
    config: str
    seconds: float
    spread: float

    def __post_init__(self) -> None:
        # An int or a NumPy float would be written in a form that is not read back as a float.
        object.__setattr__(self, "seconds", float(self.seconds))
        object.__setattr__(self, "spread", float(self.spread))


@dataclass(frozen=True)
class Advantage:
    """How many times as fast the choice is as the cost model's choice, the candidate `over`.

    low, high: an interval that holds the median of the ratios of all rounds with 99 % confidence;
    `low` is above 1. rounds: the number of rounds in which both were timed.
    """

    over: str
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Timings:
    """What was measured for a problem.

    timings: those of the candidates with right results, at least one: the choice's first, then the
    others', fastest first. baseline: the timing of the variant *dense* in its standard config in
    the same run; None if it was not timed. rejected: (candidate, reason) of the others.
    advantage: the advantage of the choice over the cost model's choice; None if they are the same.
    load: the other work on the machine.
    """

    timings: tuple[Timing, ...]
    baseline: Timing | None
    rejected: tuple[tuple[str, str], ...]
    advantage: Advantage | None
    load: Load

    @property
    def variants(self) -> set[str]:
        """The names of all variants that were tried."""
        rejected = {candidate.split(" ")[0] for candidate, _ in self.rejected}
        return rejected | {timing.variant for timing in self.timings}

    @property
    def winner(self) -> Timing:
        """The timing of the choice."""
        return self.timings[0]

    @property
    def runner_up(self) -> Timing | None:
        """The fastest of the others."""
        return self.timings[1] if len(self.timings) > 1 else None

    @property
    def gain(self) -> float | None:
        """How many times as fast the choice is as the baseline; None without a baseline."""
        return None if self.baseline is None else self.baseline.seconds / self.winner.seconds

    @property
    def margin(self) -> float | None:
        """How many times as fast the choice is as the runner-up; None without one. Below 1 if the
        runner-up seemed faster but did not prove so in enough rounds."""
        return None if self.runner_up is None else self.runner_up.seconds / self.winner.seconds
