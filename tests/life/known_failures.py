"""Operations that do not agree with stock PEFT yet: they are not drawn, and a test demands that
each still fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import Linear as LoraLinear

from qlora_compile.modules.linear import QuantizedLinear
from tests.life.operations import Attach, FunctionalGradient, Merge, Switch
from tests.life.pair import OWN_FORMATS, Operation, Pair, Start


@dataclass(frozen=True)
class KnownFailure:
    """excludes: whether an operation, drawn now, would fail for this reason. An example of it:
    `start`, then `operations`, of which the last fails."""

    reason: str
    excludes: Callable[[Pair, Any], bool]
    start: Start
    operations: tuple[Operation, ...]


def _merges_into_codes(pair: Pair, operation: Any) -> bool:
    return isinstance(operation, Merge) and any(
        type(module) is LoraLinear and isinstance(module.get_base_layer(), QuantizedLinear)
        for module in pair.ours.modules()
    )


def _measures_codes(pair: Pair, operation: Any) -> bool:
    """DoRA over a packed Linear whose adapter layer is not ours."""
    return (
        isinstance(operation, Attach)
        and operation.dora
        and pair.start.base in OWN_FORMATS
        and not set(pair.start.targets).issuperset(operation.targets)
    )


KNOWN_FAILURES: tuple[KnownFailure, ...] = (
    KnownFailure(
        "an adapter that a packed Linear got after optimize cannot be merged",
        _merges_into_codes,
        Start("nf4", ("q_proj",)),
        (Attach("second", ("down_proj",)), Switch(("second",)), Merge()),
    ),
    KnownFailure(
        "DoRA measures the codes of a packed Linear that gets it after optimize",
        _measures_codes,
        Start("nf4", ("q_proj",)),
        (Attach("second", ("down_proj",), dora=True),),
    ),
    KnownFailure(
        "a block is compiled under a functorch transform",
        lambda pair, operation: isinstance(operation, FunctionalGradient),
        Start("nf4", ("q_proj",)),
        (FunctionalGradient(),),
    ),
)


def known_to_fail(pair: Pair, operation: Any) -> bool:
    return any(failure.excludes(pair, operation) for failure in KNOWN_FAILURES)
