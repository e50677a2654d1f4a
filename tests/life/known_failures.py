"""Operations that do not agree with stock PEFT yet: they are not drawn, and a test demands that
each still fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.life.operations import Attach, Merge, Switch
from tests.life.pair import OWN_FORMATS, Operation, Pair, Start


@dataclass(frozen=True)
class KnownFailure:
    """excludes: whether an operation, drawn now, would fail for this reason. An example of it:
    `start`, then `operations`."""

    reason: str
    excludes: Callable[[Pair, Any], bool]
    start: Start
    operations: tuple[Operation, ...]


def _attaches_to_more(pair: Pair, operation: Any) -> bool:
    if not isinstance(operation, Attach) or pair.start.base not in OWN_FORMATS:
        return False
    adapted = {
        target for name in pair.adapters for target in pair.stock.peft_config[name].target_modules
    }
    return not adapted.issuperset(operation.targets)


KNOWN_FAILURES: tuple[KnownFailure, ...] = (
    KnownFailure(
        "an adapter attached after optimize to a packed Linear that had none cannot be merged",
        _attaches_to_more,
        Start("nf4", ("q_proj",)),
        (Attach("second", ("down_proj",)), Switch(("second",)), Merge()),
    ),
)


def known_to_fail(pair: Pair, operation: Any) -> bool:
    return any(failure.excludes(pair, operation) for failure in KNOWN_FAILURES)
