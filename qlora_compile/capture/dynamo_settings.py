"""Dynamo's settings for calls of compiled blocks, and for these alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch._dynamo import config

_SETTINGS = {
    # A number such as a dropout probability becomes a constant of each layer's graph, not an input.
    "specialize_float": True,
    # Without this, torch 2.11 does not notice that a parameter begins to train.
    "skip_tensor_guards_with_matching_dict_tags": False,
    # torch 2.11's default. Modules in which no dictionary has changed then need no check: a new
    # `__class__` or `__dict__` of theirs goes unnoticed, and before Python 3.12 a dictionary that
    # is gone is still read. If the setting above were on as well, torch.utils.swap_tensors, which
    # `Module.to` calls for subclasses, would refuse their parameters. Of the 45 µs that the checks
    # of a small Llama block take in a step, it saves 4, and only until the first `eval()`
    # (Python 3.12, torch 2.13).
    "use_recursive_dict_tags_for_guards": False,
    # Else Dynamo cuts a graph where its gradients fill a bucket of DDP's, before our passes see it:
    # between a Linear and its adapter, or siblings. Without cuts, DDP still reduces a block's
    # gradients while the block before it computes its own.
    "optimize_ddp": False,
    # Past the limit Dynamo silently stops compiling; one class may serve many kinds of layer.
    "recompile_limit": 64,
}


class DynamoSettings:
    """Has Dynamo use these settings, and the `further` ones, inside a `with`. Every call of a block
    enters one: a generator as a context would take longer than some of its checks."""

    def __init__(self, further: Mapping[str, Any]) -> None:
        self._change = _change(tuple(further.items()))

    def __enter__(self) -> None:
        self._revert = self._change()

    def __exit__(self, *_: object) -> None:
        self._revert()


@functools.cache
def _change(further: tuple[tuple[str, Any], ...]) -> Callable[[], Callable[[], None]]:
    # What Dynamo itself uses in every call. `config.patch` makes a class each time, which takes
    # longer than a compiled block's checks.
    return config._make_closure_patcher(**_SETTINGS | dict(further))
