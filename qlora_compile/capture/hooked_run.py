"""How a block is compiled whose modules have hooks, or why it runs as stock instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C import _autograd  # pyright: ignore[reportAttributeAccessIssue]
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchRuntimeError, Unsupported, UserError

from qlora_compile.capture.hooks import Hook
from qlora_compile.hf.blocks import checkpoints
from qlora_compile.hf.captured_outputs import (
    captured_key,
    collected_keys,
    collecting,
    starts_collecting,
)

REFUSALS = (Unsupported, FailOnRecompileLimitHit, TorchRuntimeError, UserError)
"""What Dynamo raises, before anything has run, where it does not trace a block as one graph."""

RECOMPILE_LIMIT = 8
"""Graphs for blocks with the same hooks; torch's own default. A hook may change what the guards of
its next call look at, as one that appends to a list does: Dynamo would compile at every call."""


@dataclass(frozen=True)
class HookedRun:
    """What blocks need to have in common to share a compiled forward with its hooks.

    hooks: kind, module and code of each. captured: the keys of the outputs that the forward returns
    besides its result, for transformers; None if it returns the result alone. whole: whether Dynamo
    may not break the graph.
    """

    hooks: tuple[tuple[str, str, object], ...]
    captured: tuple[str, ...] | None
    whole: bool

    @classmethod
    def of(cls, block: nn.Module, hooks: Sequence[Hook]) -> HookedRun:
        if starts_collecting(block):
            # A break costs part of the graph, running as stock all of it: this is a whole model.
            return cls(_told(hooks), None, whole=False)
        keys = {hook: captured_key(hook.function) for hook in hooks}
        others = [hook for hook in hooks if keys[hook] is None]
        captured = {key for key in keys.values() if key is not None}
        return cls(_told(others), collected_keys(captured) if captured else None, whole=True)

    @property
    def settings(self) -> dict[str, Any]:
        """Of Dynamo, besides those of a block without hooks."""
        limit = {"recompile_limit": RECOMPILE_LIMIT} if self.hooks else {}
        return {"skip_nnmodule_hook_guards": False} | limit

    def prepared(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, or what returns `captured` outputs, too."""
        return forward if self.captured is None else collecting(forward, self.captured)


def obstacle(block: nn.Module, hooks: Sequence[Hook]) -> str | None:
    """Why `block` cannot be compiled with `hooks`, as far as can be told without trying."""
    backward = [hook for hook in hooks if hook.is_backward]
    if backward:
        return f"its block ran uncompiled, because compiled code cannot call {named(backward)}"
    own = [hook for hook in hooks if captured_key(hook.function) is None]
    if own and torch.is_grad_enabled() and (checkpoints(block) or _saves_by_hooks()):
        # The checkpoint stops recomputing at the last value it has saved; where in a compiled block
        # that is, and which hooks have run by then, is not where it is in an uncompiled one.
        return (
            "its block ran uncompiled, because a checkpoint that recomputes compiled code "
            f"would not run {named(own)} as often as it has to"
        )
    return None


def untraced(hooks: Sequence[Hook]) -> str:
    return f"its block ran uncompiled, because Dynamo does not trace it whole with {named(hooks)}"


def named(hooks: Sequence[Hook], most: int = 3) -> str:
    told = [str(hook) for hook in hooks]
    rest = [f"{len(told) - most} more"] if len(told) > most else []
    return ", ".join([*told[:most], *rest])


def _told(hooks: Sequence[Hook]) -> tuple[tuple[str, str, object], ...]:
    return tuple((hook.kind, hook.module, hook.code) for hook in hooks)


def _saves_by_hooks() -> bool:
    """Whether something, such as a checkpoint around the block, replaces saved tensors."""
    return _autograd._top_saved_tensors_default_hooks(False) is not None
