"""The literal tuple of variants of the experts' grouped linear, and the choice of one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qlora_compile.kernels.device_model import CPU, DeviceModel
from qlora_compile.kernels.experts.base import ExpertsProblem, ExpertsVariant
from qlora_compile.kernels.experts.grouped import GroupedExperts
from qlora_compile.kernels.experts.native import NativeExperts
from qlora_compile.kernels.selection import able, model_for

EXPERTS_VARIANTS: tuple[ExpertsVariant, ...] = (NativeExperts(), GroupedExperts())


@dataclass(frozen=True)
class ExpertsChoice:
    """A variant, and the seconds that the cost model gives it."""

    variant: ExpertsVariant
    seconds: float


def choose(problem: ExpertsProblem) -> ExpertsChoice:
    """Do as `cheapest`, on the problem's own device."""
    # On CPU, not by measured figures, so that the choice is the same on every run.
    return cheapest(problem, model_for(problem.device, CPU))


@functools.lru_cache(maxsize=4096)
def cheapest(problem: ExpertsProblem, model: DeviceModel) -> ExpertsChoice:
    """Return the variant with the least modelled cost of those that do not reject `problem`.

    Raises NoVariantError, with every reason, if all reject it.
    """
    variants = able(EXPERTS_VARIANTS, problem)
    costs = [ExpertsChoice(variant, variant.cost(problem, model)) for variant in variants]
    return min(costs, key=lambda choice: choice.seconds)
