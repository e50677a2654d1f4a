"""Says how blocks whose modules have hooks or replaced forwards are compiled, or why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C import _autograd  # pyright: ignore[reportAttributeAccessIssue]
from torch._dynamo.exc import (
    FailOnRecompileLimitHit,
    InternalTorchDynamoError,
    TorchRuntimeError,
    Unsupported,
    UserError,
)

from qlora_compile.capture.hooks import FORWARD, Hook
from qlora_compile.hf.blocks import checkpoints
from qlora_compile.hf.captured_outputs import (
    captured_key,
    collected_keys,
    collecting,
    starts_collecting,
)

REFUSALS = (
    Unsupported,
    FailOnRecompileLimitHit,
    TorchRuntimeError,
    UserError,
    # torch 2.11 raises it where later versions call a parameter's __dict__ unsupported.
    InternalTorchDynamoError,
)
"""Errors that Dynamo raises, before anything has run, if it cannot trace a block as one graph."""

RECOMPILE_LIMIT = 8
"""How many graphs blocks with the same hooks may have; torch's own default.

A hook may change what the guards of its next call check, for example by appending to a list.
Without a limit Dynamo would then compile at every call.
"""


@dataclass(frozen=True)
class HookedRun:
    """What blocks with hooks must have in common to share a compiled forward.

    hooks: the kind, the module's path and the code of each hook. captured: the keys of the inner
    outputs that the forward returns beside its result, for transformers; None if it returns the
    result alone. whole: whether the block must be one graph, without breaks.
    """

    hooks: tuple[tuple[str, str, object], ...]
    captured: tuple[str, ...] | None
    whole: bool

    @classmethod
    def of(cls, block: nn.Module, hooks: Sequence[Hook]) -> HookedRun:
        if starts_collecting(block):
            # The block is a whole model. With graph breaks a part of it runs uncompiled; otherwise
            # all of it would.
            return cls(_identities(hooks), None, whole=False)
        keys = {hook: captured_key(hook.function) for hook in hooks}
        others = [hook for hook in hooks if keys[hook] is None]
        captured = {key for key in keys.values() if key is not None}
        return cls(_identities(others), collected_keys(captured) if captured else None, whole=True)

    @property
    def is_watched(self) -> bool:
        """Whether there are hooks proper, not only replaced forwards; they see modules' inputs."""
        return any(kind != FORWARD for kind, _, _ in self.hooks)

    @property
    def settings(self) -> dict[str, Any]:
        """Dynamo's settings for these blocks, to be added to those of blocks without hooks."""
        if not self.is_watched and self.captured is None:
            return {}
        limit = {"recompile_limit": RECOMPILE_LIMIT} if self.hooks else {}
        return {"skip_nnmodule_hook_guards": False} | limit

    def prepared(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return `forward`, wrapped to return the `captured` outputs too if there are any.

        If the block's own forward is replaced, the result takes the replacement as its first
        argument, in place of the module.
        """
        if any(kind == FORWARD and not path for kind, path, _ in self.hooks):
            forward = _call
        return forward if self.captured is None else collecting(forward, self.captured)


def obstacle(block: nn.Module, hooks: Sequence[Hook]) -> str | None:
    """Return why `block` cannot be compiled with `hooks`; None if only trying can tell."""
    backward = [hook for hook in hooks if hook.is_backward]
    if backward:
        return f"its block ran uncompiled, because compiled code cannot call {hook_names(backward)}"
    forwards = [hook for hook in hooks if hook.kind == FORWARD]
    if forwards and not forwards[0].module and checkpoints(block):
        return f"its block ran uncompiled under a checkpoint, because of {hook_names(forwards[:1])}"
    own = [h for h in hooks if h.kind != FORWARD and captured_key(h.function) is None]
    if own and torch.is_grad_enabled() and (checkpoints(block) or _saves_by_hooks()):
        # The checkpoint stops recomputing at the last value it has saved. A compiled block reaches
        # that value at another place than an uncompiled one, and other hooks have run by then.
        return (
            "its block ran uncompiled, because a checkpoint that recomputes compiled code "
            f"would run {hook_names(own)} too seldom"
        )
    return None


def untraced(hooks: Sequence[Hook]) -> str:
    """Return the reason for a block that Dynamo refused to trace as one graph."""
    names = hook_names(hooks)
    return f"its block ran uncompiled, because Dynamo cannot trace it as one graph with {names}"


def hook_names(hooks: Sequence[Hook], most: int = 3) -> str:
    names = [str(hook) for hook in hooks]
    rest = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *rest])


def _call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _identities(hooks: Sequence[Hook]) -> tuple[tuple[str, str, object], ...]:
    return tuple((hook.kind, hook.module, hook.code) for hook in hooks)


def _saves_by_hooks() -> bool:
    """Whether saved-tensor hooks are active, such as those of a checkpoint around the block."""
    return _autograd._top_saved_tensors_default_hooks(False) is not None
