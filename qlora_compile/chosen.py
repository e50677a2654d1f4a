"""Chosen: the variant that computes one direction of a fused site, for reports."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_compile.kernels.experts.base import ExpertsProblem
from qlora_compile.kernels.experts.registry import choose
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selector import ModelledSelector


@dataclass(frozen=True)
class Chosen:
    """The variant that computes one direction of a fused site, for about `rows` rows.

    n, rank: those of the site and of the siblings computed with it ("576+192+192", "16"). measured:
    whether the variant was timed on this device against others; if not, the cost model chose it,
    `seconds` is modelled, and the rest is None. seconds: the median. gain: how many times as fast
    as *dense* in its standard config. runner_up: the second best variant. margin: how many times as
    fast as the runner-up. unmeasured: if a measurement was tried, why none counts.
    """

    rows: int
    n: str
    rank: str
    variant: str
    config: str
    measured: bool
    seconds: float
    gain: float | None
    runner_up: str | None
    margin: float | None
    unmeasured: str | None = None

    @classmethod
    def of(cls, problem: Problem, selector: ModelledSelector) -> Chosen:
        choice = selector.look_up(problem)
        measured = choice.measured
        return cls(
            rows=problem.m,
            n=problem.columns,
            rank=problem.ranks,
            variant=choice.variant.name,
            config=choice.config.label,
            measured=measured is not None,
            seconds=choice.seconds,
            gain=measured and measured.gain,
            runner_up=measured and measured.runner_up,
            margin=measured and measured.margin,
            unmeasured=None if measured else selector.unmeasured(problem),
        )

    @classmethod
    def of_experts(cls, problem: ExpertsProblem) -> Chosen:
        choice = choose(problem)
        n, rank = f"{problem.experts} x {problem.n}", str(problem.rank)
        shape = (problem.m, n, rank)
        return cls(*shape, choice.variant.name, "-", False, choice.seconds, None, None, None)
