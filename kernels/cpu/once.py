"""once: caches a function's results, each of which one thread computes while others wait for it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def once(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Return `function` as by `functools.cache`, but never run for the same arguments by two
    threads. Positional arguments only. What it raises is not kept."""
    cached: Callable[..., _Result] = functools.cache(function)
    locks: dict[tuple[Hashable, ...], Any] = {}

    @functools.cache
    @functools.wraps(function)
    def alone(*arguments: Hashable) -> _Result:
        with locks.setdefault(arguments, threading.Lock()):
            return cached(*arguments)

    return alone
