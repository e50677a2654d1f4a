"""Attentions, router logits and other inner outputs, which transformers collects by forward hooks.

transformers puts such a hook on a module once, for good. The hook appends the module's output to
the list of its key in the collector of the model's call, if that call has a collector with the key.
The collector is held by a ContextVar, which Dynamo cannot read. Compiled code therefore fills a
collector of its own, as transformers lets it, and returns the collector beside its result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _active_collector, install_output_capuring_hook


def _capturing_code() -> object:
    """The code that all of transformers' hooks share: that of the hook on a module made for it."""
    module = nn.Module()
    install_output_capuring_hook(module, "", 0)
    (hook,) = module._forward_hooks.values()
    return hook.__code__


_CODE = _capturing_code()

_COUNTED = "hidden_states"
"""Of this key, a hook looks how many outputs all layers together have collected so far."""


def captured_key(function: Any) -> str | None:
    """The key that a hook of transformers collects outputs for; None for every other hook."""
    if getattr(function, "__code__", None) is not _CODE:
        return None
    key = inspect.getclosurevars(function).nonlocals["key"]
    return None if key == _COUNTED else key


def collected_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Those of `keys` that the call under way collects."""
    collector = _active_collector.get() or {}
    return tuple(sorted(set(keys) & collector.keys()))


def collecting(forward: Callable[..., Any], keys: Iterable[str]) -> Callable[..., Any]:
    """A function that calls `forward` and returns its result and what was collected for `keys`."""

    def collect(module, *args, **kwargs):
        collected = {key: [] for key in keys}
        token = _active_collector.set(collected)
        try:
            return forward(module, *args, **kwargs), collected
        finally:
            _active_collector.reset(token)

    return collect


def hand_on(collected: Mapping[str, list[Any]]) -> None:
    """Appends what a block has collected to the collector of the call under way. There is none
    while a checkpoint recomputes the block; the outputs have been handed on before, then."""
    collector = _active_collector.get()
    if collector is not None:
        for key, outputs in collected.items():
            collector[key] += outputs


def starts_collecting(module: nn.Module) -> bool:
    """Whether a collector may be made inside `module`, as every model of transformers does."""
    return any(isinstance(each, PreTrainedModel) for each in module.modules())
