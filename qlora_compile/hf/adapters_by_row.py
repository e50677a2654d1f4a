"""Batches whose rows each have their own adapter, by PEFT's adapter_names or by aLoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

_OF_ROWS = {"adapter_names", "alora_offsets"}
"""Keywords by which PEFT tells an adapter layer what to do with each row."""


def is_given_by_row(functions: Iterable[object], kwargs: Mapping[str, Any]) -> bool:
    """Whether each row of a call has its own adapter, given by one of the hooks `functions`, which
    PEFT puts on layers inside a block, or by the block's own `kwargs`."""
    return not _OF_ROWS.isdisjoint(kwargs) or any(map(_is_pefts, functions))


def _is_pefts(hook: object) -> bool:
    return (
        isinstance(hook, partial)
        and getattr(hook.func, "__module__", "").startswith("peft.")
        and not _OF_ROWS.isdisjoint(hook.keywords)
    )
