"""Operations that do not agree with stock PEFT yet. They are not drawn, and a test demands that
each still fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.life.pair import Operation, Pair, Start


@dataclass(frozen=True)
class KnownFailure:
    """excludes: whether an operation, drawn now, would fail for this reason. An example of it:
    `start`, then `operations`, of which the last fails."""

    reason: str
    excludes: Callable[[Pair, Any], bool]
    start: Start
    operations: tuple[Operation, ...]


KNOWN_FAILURES: tuple[KnownFailure, ...] = ()


def known_to_fail(pair: Pair, operation: Any) -> bool:
    return any(failure.excludes(pair, operation) for failure in KNOWN_FAILURES)
