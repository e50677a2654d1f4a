"""The registry of what people do to a model between two training steps.

An operation is a frozen dataclass. `drawn` is a strategy for it, or None where stock PEFT does not
allow it or it would do nothing; `apply` does it to both models of a pair. An operation is drawn
from the line on that adds it here.
"""

from __future__ import annotations

from typing import Any

from tests.life.adapter_operations import (
    Attach,
    Delete,
    Disable,
    Enable,
    Merge,
    Reload,
    Scale,
    Switch,
    Unmerge,
)
from tests.life.hook_operations import Hook, ReplaceForward, Unhook
from tests.life.model_operations import (
    Cast,
    Copy,
    LoadState,
    Mode,
    OptimizerStep,
    OuterCompile,
    Train,
)
from tests.life.step_operations import (
    Ask,
    Autocast,
    Backward,
    Batch,
    Checkpointing,
    Evaluate,
    FunctionalGradient,
)

OPERATIONS: tuple[Any, ...] = (
    Attach,
    Reload,
    Switch,
    Delete,
    Merge,
    Unmerge,
    Disable,
    Enable,
    Scale,
    Hook,
    Unhook,
    ReplaceForward,
    Mode,
    Train,
    Cast,
    Copy,
    OptimizerStep,
    LoadState,
    OuterCompile,
    Batch,
    Autocast,
    Checkpointing,
    Backward,
    Ask,
    Evaluate,
    FunctionalGradient,
)
