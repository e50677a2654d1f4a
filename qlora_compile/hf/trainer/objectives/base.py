"""Objective: which rows it trains on, for which model, by which trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Head = Literal["causal", "score", "classes"]
"""What the model computes: logits of the next token, a score of the text, logits of classes."""


@dataclass(frozen=True)
class Objective:
    """One objective.

    kinds: of rows that it trains on. load: imports the trainer and its configuration, which takes
    seconds. defaults: of the configuration, where they are not those of every run.
    keeps_learning_rate: the trainer's own default is a better learning rate than that of every run.
    """

    name: str
    kinds: tuple[str, ...]
    head: Head
    load: Callable[[], tuple[Any, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keeps_learning_rate: bool = True
    needs_reward: bool = False
