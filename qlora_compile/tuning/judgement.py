"""Judgement: what a measurement decides, or why it does not count."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora_compile.kernels import registry
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice, Measured, is_standard
from qlora_compile.tuning.caution import Caution
from qlora_compile.tuning.load import Load
from qlora_compile.tuning.rounds import interval_of_median, ratios, undisturbed, usual
from qlora_compile.tuning.timings import Advantage, Timing, Timings


@dataclass
class Measurement:
    """The result of measuring. seconds: every timing of each correct candidate, by its index in the
    cost model's order. rejected: the reasons against the other candidates, by index. load: the
    other work on the machine."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    load: Load = field(default_factory=Load)

    @property
    def rounds(self) -> list[list[float]]:
        """The seconds, round by round, of the candidates that took part to the end."""
        count = max(map(len, self.seconds.values()), default=0)
        # The first timing of each is that of the check.
        return [taken[1:] for taken in self.seconds.values() if len(taken) == count]

    def median(self, index: int) -> float:
        return usual(self.seconds[index])

    def spread(self, index: int) -> float:
        """Return the interquartile range in seconds."""
        taken = undisturbed(self.seconds[index])
        if len(taken) < 2:
            return 0.0
        low, _, high = statistics.quantiles(taken, n=4)
        return high - low

    @property
    def ranking(self) -> list[int]:
        """The indices of the correct candidates, fastest first."""
        return sorted(self.seconds, key=self.median)


@dataclass(frozen=True)
class Trial:
    """A measurement of `problem`, in which at least one candidate was timed.

    tried: the candidates that `result` numbers, in the cost model's order, with modelled seconds.
    rejected: reasons by the candidates' names, including candidates that were tried before.
    """

    problem: Problem
    tried: Sequence[Choice]
    result: Measurement
    rejected: Mapping[str, str]


@dataclass(frozen=True)
class Doubt:
    """Why a measurement does not count. busy: whether because of other work on the machine.
    claimed: the name of the choice whose gain another measurement has to confirm."""

    reason: str
    busy: bool
    claimed: str | None = None


def judge(trial: Trial, caution: Caution, claimed: str | None = None) -> Timings | Doubt:
    """Return what a measurement decides, or why it does not count.

    The cost model's choice stays the choice, unless another is faster and the interval of its gain
    excludes 1. claimed: as in the Doubt of an earlier measurement of the same problem.
    """
    problem, tried, result = trial.problem, trial.tried, trial.result
    disturbance = result.load.disturbance(caution)
    if disturbance is not None:
        machine = "machine" if problem.device == "cpu" else "GPU"
        return Doubt(f"the {machine} was busy, {disturbance}", True, claimed)
    chosen, advantage = _chosen(tried, result)
    name = tried[chosen].name
    if name != claimed:
        surprise = _surprise(trial, chosen, caution)
        if surprise is not None:
            return Doubt(f"{name} {surprise}, which no second measurement confirmed", False, name)
    order = [chosen, *(index for index in result.ranking if index != chosen)]
    timed = {index: _timing(tried[index], result, index) for index in order}
    baselines = (timed[index] for index in order if is_standard(tried[index], problem))
    rejected = tuple(trial.rejected.items())
    return Timings(tuple(timed.values()), next(baselines, None), rejected, advantage, result.load)


def _chosen(tried: Sequence[Choice], result: Measurement) -> tuple[int, Advantage | None]:
    modelled = min(result.seconds)
    for index in result.ranking:
        if index == modelled:
            break
        gains = ratios(result.seconds, index, modelled)
        interval = interval_of_median(gains)
        if interval is not None and interval[0] > 1:
            return index, Advantage(tried[modelled].name, *interval, rounds=len(gains))
    return modelled, None


def _surprise(trial: Trial, chosen: int, caution: Caution) -> str | None:
    """Return in words a gain so large that the cost model would have to be very wrong, or None."""
    tried, result = trial.tried, trial.result

    def gain_and_error(other: int) -> tuple[float, float]:
        gain = result.median(other) / result.median(chosen)
        return gain, gain / (tried[other].seconds / tried[chosen].seconds)

    for index in result.seconds:
        gain, error = gain_and_error(index)
        if is_standard(tried[index], trial.problem) and error > caution.surprise and gain > 1:
            return f"seemed {gain:.1f} times as fast as {tried[index].name}"
    gain, error = gain_and_error(min(result.seconds))
    if error > caution.reversal:
        return f"seemed {gain:.1f} times as fast as the cost model's choice"
    return None


def _timing(choice: Choice, result: Measurement, index: int) -> Timing:
    median, spread = result.median(index), result.spread(index)
    return Timing(choice.variant.name, choice.config.label, median, spread)


def choice_of(problem: Problem, timings: Timings) -> Choice | None:
    """Return the choice of `timings`; None if this version does not offer it for `problem`."""
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
