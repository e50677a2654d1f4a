"""Finds the reward functions that the command line names."""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_compile.training.errors import RewardFunctionError


def reward_functions(text: str | None, objective: Any) -> list[Callable[..., Any]] | None:
    """Return the functions that `text` names, None if the objective needs none.

    text: FILE.py:FUNCTION or MODULE:FUNCTION, or several separated by commas. A function
    takes TRL's arguments, prompts, completions and the other columns, and returns a number for each
    completion.

    Raises:
        RewardFunctionError: a function does not exist, or is missing, or the objective takes none.
    """
    if (text is not None) != objective.needs_reward:
        problem = "is needed for" if objective.needs_reward else "is not used by"
        raise RewardFunctionError(value=text, problem=f"a reward {problem} {objective.name}")
    return None if text is None else [_function(part) for part in text.split(",")]


def _function(text: str) -> Callable[..., Any]:
    place, _, name = text.strip().rpartition(":")
    if not place or not name:
        raise RewardFunctionError(value=text, problem="a file or module and a function are named")
    try:
        if place.endswith(".py"):
            found = runpy.run_path(str(Path(place)))[name]
        else:
            found = getattr(importlib.import_module(place), name)
    except (OSError, ImportError, AttributeError, KeyError) as error:
        problem = f"not found ({type(error).__name__}: {error})"
        raise RewardFunctionError(value=text, problem=problem) from error
    return found
