"""The literal tuples of what there is to choose from, and the choice."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qlora_compile.errors import NoVariantError
from qlora_compile.kernels.device_model import device_model
from qlora_compile.kernels.formats.formats import FORMATS, UNQUANTIZED, format_named
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.variants.augmented import Augmented
from qlora_compile.kernels.variants.base import Config, Variant
from qlora_compile.kernels.variants.dense import Dense
from qlora_compile.kernels.variants.fused import Fused, Skinny
from qlora_compile.kernels.variants.tail import Tail
from qlora_compile.problem import Problem

__all__ = ["FORMATS", "UNQUANTIZED", "VARIANTS", "Choice", "format_named", "select"]

VARIANTS: tuple[Variant, ...] = (Dense(), Tail(), Augmented(), Fused(), Skinny())


@dataclass(frozen=True)
class Choice:
    """A variant, one of its configs, and what the cost model makes of it: modelled seconds."""

    variant: Variant
    config: Config
    seconds: float


@functools.lru_cache(maxsize=4096)
def select(problem: Problem) -> Choice:
    """The variant and config with the least modelled cost among those that do not reject `problem`.

    Raises NoVariantError with every variant's reasons when all do.
    """
    model = device_model(problem.device, target_of(problem.device))
    reasons: dict[str, list[str]] = {}
    choices = []
    for variant in VARIANTS:
        reasons[variant.name] = variant.rejects(problem)
        if not reasons[variant.name]:
            choices += [
                Choice(variant, config, variant.cost(problem, config, model))
                for config in variant.configs(problem)
            ]
    if choices:
        return min(choices, key=lambda choice: choice.seconds)
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
    raise NoVariantError(problem=problem, reasons=listed)
