"""Dynamo's settings for calls of compiled blocks, and for these alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch._dynamo import config

_SETTINGS = {
    # A number such as a dropout probability becomes a constant of each layer's graph, not an input.
    "specialize_float": True,
    # Without this, torch 2.11 does not notice that a parameter begins to train.
    "skip_tensor_guards_with_matching_dict_tags": False,
    # Past the limit Dynamo silently stops compiling; one class may serve many kinds of layer.
    "recompile_limit": 64,
}


@contextmanager
def dynamo_settings(further: Mapping[str, Any]) -> Iterator[None]:
    """Have Dynamo use these settings, and the `further` ones, inside the context."""
    revert = _change(tuple(further.items()))()
    try:
        yield
    finally:
        revert()


@functools.cache
def _change(further: tuple[tuple[str, Any], ...]) -> Callable[[], Callable[[], None]]:
    # What Dynamo itself uses in every call. `config.patch` makes a class each time, which takes
    # longer than a compiled block's checks.
    return config._make_closure_patcher(**_SETTINGS | dict(further))
