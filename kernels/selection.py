"""Chooses a variant for a Problem, by functions without state; `kernels/selector.py` holds the
measurements.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_compile.errors import NoVariantError
from qlora_compile.kernels import registry
from qlora_compile.kernels.device_model import CpuModel, DeviceModel, device_model
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.variants.base import Config, Variant

BASELINE = "dense"

HANDFUL = 5
"""How many candidates to measure for a problem; the cost model is right within about 15 %."""

_OF_ONE_VARIANT = 3
"""How many candidates of one variant to measure: the cost model ranks configs of a variant less
well than it ranks variants."""

_HOPELESS = 2.0
"""A candidate modelled to take this many times as long as the standard *dense* is not measured, as
the cost model would have to be wrong by that factor."""


@dataclass(frozen=True)
class Measured:
    """The measurement of a choice. gain: how many times as fast as the standard *dense* it is.
    margin: how many times as fast as the second fastest, `runner_up`. None if that other candidate
    gave wrong results."""

    gain: float | None
    runner_up: str | None
    margin: float | None


@dataclass(frozen=True)
class Choice:
    """A variant, one of its configs, and the seconds it takes: measured, or else modelled."""

    variant: Variant
    config: Config
    seconds: float
    measured: Measured | None = None

    @property
    def name(self) -> str:
        return f"{self.variant.name} {self.config.label}".removesuffix(" -")


def choose(
    problem: Problem,
    records: Mapping[Problem, Choice],
    model: DeviceModel,
    excluded: Collection[str] = (),
) -> Choice:
    """Return the recorded choice for `problem`, else the choice of least modelled cost whose name
    is not `excluded`.

    A pure function of its arguments. Raises NoVariantError like `candidates`.
    """
    if problem in records:
        return records[problem]
    ranked = candidates(problem, model)
    return next((choice for choice in ranked if choice.name not in excluded), ranked[0])


def candidates(problem: Problem, model: DeviceModel) -> list[Choice]:
    """Return every config of every variant that does not reject `problem`, by modelled cost.

    Raises NoVariantError like `able`.
    """
    choices = (
        Choice(variant, config, variant.cost(problem, config, model))
        for variant in able(registry.VARIANTS, problem)
        for config in variant.configs(problem)
    )
    return sorted(choices, key=lambda choice: choice.seconds)


def able(variants: Sequence[Any], problem: Problem) -> list[Any]:
    """Return those of `variants` that do not reject `problem`. Raises NoVariantError, with every
    variant's reasons, if all reject it."""
    reasons = {variant.name: variant.rejects(problem) for variant in variants}
    found = [variant for variant in variants if not reasons[variant.name]]
    if not found:
        listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
        raise NoVariantError(problem=problem, reasons=listed)
    return found


def shortlist(ranked: Sequence[Choice], problem: Problem, limit: int = HANDFUL) -> list[Choice]:
    """Return the candidates worth measuring, out of those `ranked` by modelled cost.

    These are the best `limit`, but only a few of each variant, and none that is modelled much
    slower than the standard *dense*, which is always among them because gains are relative to it.
    """
    count: Counter[str] = Counter()
    listed = []
    standard = next((choice for choice in ranked if is_standard(choice, problem)), None)
    longest = math.inf if standard is None else _HOPELESS * standard.seconds
    for choice in ranked:
        count[choice.variant.name] += 1
        few = len(listed) < limit and count[choice.variant.name] <= _OF_ONE_VARIANT
        if choice is standard or (few and choice.seconds <= longest):
            listed.append(choice)
    return listed


def is_standard(choice: Choice, problem: Problem) -> bool:
    """Whether `choice` is *dense* in its first config."""
    return choice.variant.name == BASELINE and choice.config == choice.variant.configs(problem)[0]


@functools.lru_cache(maxsize=4096)
def modelled(problem: Problem, model: DeviceModel, excluded: frozenset[str]) -> Choice:
    """Do as `choose` without records, and remember the result."""
    return choose(problem, {}, model, excluded)


def model_for(device: str, cpu: CpuModel) -> DeviceModel:
    """Return the cost model's figures of a torch device: `cpu` if Triton has no target for it."""
    target = target_of(device)
    return cpu if target is None else device_model(device, target)


def saving_is_faster(problems: Sequence[Problem], seconds: Sequence[float]) -> bool:
    """Whether a call is faster if its forward saves S for the backward. seconds: those of the
    choice for each of the call's `problems`."""
    total = {True: 0.0, False: 0.0}
    for problem, each in zip(problems, seconds, strict=True):
        total[problem.keeps_low_rank] += each
    return total[True] < total[False]


def problems_of_call(forward: Problem, *, trains: bool) -> tuple[Problem, ...]:
    """Return the Problems of one call, given its forward's: both directions if it `trains`, each
    with and without S saved if it has adapters."""
    directions: tuple[Direction, ...] = ("forward", "backward") if trains else ("forward",)
    saving = (False, True) if trains and forward.rank else (False,)
    return tuple(
        replace(forward, direction=direction, keeps_low_rank=saves)
        for saves in saving
        for direction in directions
    )
