"""Choosing a variant for a Problem: functions of their arguments alone, without any state.

`kernels/selector.py` holds what was measured.
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
"""Candidates measured for a problem: the cost model is right within 15 % or so."""

_OF_ONE_VARIANT = 3
"""Candidates of one variant that are measured: the cost model tells its configs apart less well
than it tells variants apart."""

_HOPELESS = 2.0
"""A candidate modelled to take this many times as long as the standard *dense* is not measured: the
cost model would have to be wrong by that factor."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a choice. gain: how many times as fast as the standard *dense* it is.
    margin: the same beside the second fastest, `runner_up`. None where the other one gave wrong
    results."""

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
    """The recorded choice for `problem`, else the one with the least modelled cost, unless its name
    is `excluded`.

    A pure function of its arguments. Raises NoVariantError as `candidates` does.
    """
    if problem in records:
        return records[problem]
    ranked = candidates(problem, model)
    return next((choice for choice in ranked if choice.name not in excluded), ranked[0])


def candidates(problem: Problem, model: DeviceModel) -> list[Choice]:
    """Every config of every variant that does not reject `problem`, by modelled cost.

    Raises NoVariantError as `able` does.
    """
    choices = (
        Choice(variant, config, variant.cost(problem, config, model))
        for variant in able(registry.VARIANTS, problem)
        for config in variant.configs(problem)
    )
    return sorted(choices, key=lambda choice: choice.seconds)


def able(variants: Sequence[Any], problem: Problem) -> list[Any]:
    """Those of `variants` that do not reject `problem`. Raises NoVariantError, with every variant's
    reasons, when all reject it."""
    reasons = {variant.name: variant.rejects(problem) for variant in variants}
    found = [variant for variant in variants if not reasons[variant.name]]
    if not found:
        listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
        raise NoVariantError(problem=problem, reasons=listed)
    return found


def shortlist(ranked: Sequence[Choice], problem: Problem, limit: int = HANDFUL) -> list[Choice]:
    """The candidates worth measuring out of those `ranked` by modelled cost: the best `limit`, but
    only a few of each variant and none that is modelled much slower than the standard *dense*.
    The standard is always among them, because gains are stated relative to it."""
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
    """`choose` without records, remembered."""
    return choose(problem, {}, model, excluded)


def model_for(device: str, cpu: CpuModel) -> DeviceModel:
    """The cost model's figures of a torch device; `cpu` where Triton has no target for it."""
    target = target_of(device)
    return cpu if target is None else device_model(device, target)


def saving_is_faster(problems: Sequence[Problem], seconds: Sequence[float]) -> bool:
    """Whether a call is faster if its forward saves S for the backward; seconds: of the choice for
    each of the call's `problems`."""
    total = {True: 0.0, False: 0.0}
    for problem, each in zip(problems, seconds, strict=True):
        total[problem.keeps_low_rank] += each
    return total[True] < total[False]


def problems_of_call(forward: Problem, *, trains: bool) -> tuple[Problem, ...]:
    """The Problems of one call, given that of its forward: both directions if it `trains`, each
    with S saved and without if it has adapters."""
    directions: tuple[Direction, ...] = ("forward", "backward") if trains else ("forward",)
    saving = (False, True) if trains and forward.rank else (False,)
    return tuple(
        replace(forward, direction=direction, keeps_low_rank=saves)
        for saves in saving
        for direction in directions
    )
