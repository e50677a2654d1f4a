"""Own graphs: tells layers whether a compiled block of ours is being traced.

A torch.compile or torch.export around the model traces layers too. Nothing updates their slots
before such a graph runs, so there they run PEFT's own forward, which Dynamo guards.
"""

from __future__ import annotations

import threading
from typing import Any

import torch


class _Calls(threading.local):
    """The calls of compiled blocks that are under way in this thread, the innermost last.

    Each thread has its list, as autograd's threads recompute several checkpointed regions at once.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []


CALLS = _Calls()


@torch.compiler.assume_constant_result
def in_own_graph() -> bool:
    """Return whether a compiled block is being called. Dynamo makes the answer a constant of what
    it traces: a block's graph runs in calls of the block, another's graph does not."""
    return len(CALLS.stack) > 0
