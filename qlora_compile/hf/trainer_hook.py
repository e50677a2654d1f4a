"""A hook of transformers' Trainer that acts on the model when training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class BeforeTraining(TrainerCallback):
    """Calls `act(model)` when training begins, also if only then a `model_init` has made it."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        self.act = act

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.act(model)
