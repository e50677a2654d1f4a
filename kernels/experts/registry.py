"""The literal tuple of implementations of the experts' grouped linear, and the choice of one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qlora_compile.errors import NoVariantError
from qlora_compile.kernels.device_model import CPU, DeviceModel, device_model
from qlora_compile.kernels.experts.base import ExpertsProblem, ExpertsVariant
from qlora_compile.kernels.experts.grouped import GroupedExperts
from qlora_compile.kernels.experts.native import NativeExperts
from qlora_compile.kernels.gpu.target import target_of

EXPERTS_VARIANTS: tuple[ExpertsVariant, ...] = (NativeExperts(), GroupedExperts())


@dataclass(frozen=True)
class ExpertsChoice:
    """An implementation, and the seconds the cost model gives it."""

    variant: ExpertsVariant
    seconds: float


def choose(problem: ExpertsProblem) -> ExpertsChoice:
    """As `cheapest`, on the problem's own device."""
    target = target_of(problem.device)
    # On CPU the same on every run: not by figures that were measured.
    return cheapest(problem, CPU if target is None else device_model(problem.device, target))


@functools.lru_cache(maxsize=4096)
def cheapest(problem: ExpertsProblem, model: DeviceModel) -> ExpertsChoice:
    """The implementation with the least modelled cost of those that do not reject `problem`.

    Raises NoVariantError, with every reason, when all reject it.
    """
    reasons = {variant.name: variant.rejects(problem) for variant in EXPERTS_VARIANTS}
    able = [variant for variant in EXPERTS_VARIANTS if not reasons[variant.name]]
    if not able:
        listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
        raise NoVariantError(problem=problem, reasons=listed)
    costs = [ExpertsChoice(variant, variant.cost(problem, model)) for variant in able]
    return min(costs, key=lambda choice: choice.seconds)
