"""Inner outputs (attentions, router logits, …), which transformers collects by forward hooks.

transformers puts a hook on each module, once and for good. A model's call may have a collector, a
dictionary of lists by key. The hook appends the module's output to the list of its key, if the
collector has that key. The collector is in a ContextVar, which Dynamo cannot read. Compiled code
therefore fills a collector of its own and returns it beside its result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _active_collector, install_output_capuring_hook


def _capturing_code() -> object:
    """Return the code object that all of transformers' hooks share, read from a hook made here."""
    module = nn.Module()
    install_output_capuring_hook(module, "", 0)
    (hook,) = module._forward_hooks.values()
    return hook.__code__


_CODE = _capturing_code()

_COUNTED = "hidden_states"
"""For this key, a hook reads how many outputs all layers together have collected so far."""


def captured_key(function: Any) -> str | None:
    """Return the key that a hook of transformers collects outputs for; None for other hooks."""
    if getattr(function, "__code__", None) is not _CODE:
        return None
    key = inspect.getclosurevars(function).nonlocals["key"]
    return None if key == _COUNTED else key


def collected_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Return, sorted, those `keys` that the call under way collects."""
    collector = _active_collector.get() or {}
    return tuple(sorted(set(keys) & collector.keys()))


def collecting(forward: Callable[..., Any], keys: Iterable[str]) -> Callable[..., Any]:
    """Return a function that returns `forward`'s result, and the outputs collected for `keys`."""

    def collect(module, *args, **kwargs):
        collected = {key: [] for key in keys}
        token = _active_collector.set(collected)
        try:
            return forward(module, *args, **kwargs), collected
        finally:
            _active_collector.reset(token)

    return collect


def append_collected(collected: Mapping[str, list[Any]]) -> None:
    """Append the outputs that a block has collected to the collector of the call under way.

    While a checkpoint recomputes the block there is no collector and nothing to append: the
    forward has appended the outputs before.
    """
    collector = _active_collector.get()
    if collector is not None:
        for key, outputs in collected.items():
            collector[key] += outputs


def starts_collecting(module: nn.Module) -> bool:
    """Whether `module` contains a transformers model, which may make a collector in its call."""
    return any(isinstance(each, PreTrainedModel) for each in module.modules())
