"""LoRA's settings: checks them and makes PEFT's configuration for a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from qlora_compile.errors import (
    AdapterConfigError,
    AdaptersPresentError,
    AdapterTargetError,
    ModelTypeError,
    OutOfRangeError,
)
from qlora_compile.hf.conv1d import LinearSite
from qlora_compile.hf.loading import is_causal

_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}


def require_plain_model(model: object) -> None:
    """Check that a model is a transformers model that has no adapters yet.

    Raises:
        ModelTypeError: it is not a transformers model.
        AdaptersPresentError: it is a PeftModel.
    """
    if isinstance(model, PeftModel):
        raise AdaptersPresentError(value=type(model).__name__)
    if not isinstance(model, PreTrainedModel):
        raise ModelTypeError(value=type(model).__name__)


def require_adapter_settings(
    rank: object, alpha: object, dropout: object, patterns: Iterable[str] = ()
) -> None:
    """Check LoRA's rank, alpha and dropout, and the regular expressions of rank_pattern.

    Raises:
        OutOfRangeError: rank, alpha or dropout cannot be used.
        AdapterConfigError: a pattern is no regular expression.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise OutOfRangeError(name="rank", value=rank, allowed="an integer of 1 or more")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise OutOfRangeError(name="alpha", value=alpha, allowed="a number above 0")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise OutOfRangeError(name="dropout", value=dropout, allowed="a number from 0 to below 1")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            remedy = f"write a name or a regular expression ({error})"
            raise AdapterConfigError(field="rank_pattern", value=pattern, remedy=remedy) from error


def lora_config(
    model: Any, *, rank: int, alpha: float, dropout: float, target_modules: Any, **others: Any
) -> LoraConfig:
    """Return PEFT's configuration for a model; it also trains the new head of a classifier.

    others: other arguments of LoraConfig, such as use_dora and rank_pattern.

    Raises:
        OutOfRangeError: rank, alpha or dropout cannot be used.
        AdapterTargetError, AdapterConfigError: a name in a list of target_modules or in
            rank_pattern matches no module.
    """
    patterns = others.get("rank_pattern") or ()
    require_adapter_settings(rank, alpha, dropout, patterns)
    listed = () if isinstance(target_modules, str) else target_modules
    _require_known_names(model, listed, patterns)
    name = type(model).__name__
    task = TaskType.CAUSAL_LM if is_causal(name) else None
    for ending, known in _TASKS.items():
        if name.endswith(ending):
            task = known
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  PEFT divides it, any number will do
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type=task,
        **others,
    )


def _require_known_names(model: Any, targets: Iterable[str], patterns: Iterable[str]) -> None:
    """Raise for a name that matches no module; PEFT passes over such a name if others match."""
    modules = dict(model.named_modules())
    linears = (name for name, module in modules.items() if isinstance(module, LinearSite))
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise AdapterTargetError(rule=target, known=known)
    for pattern in patterns:
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in modules):
            remedy = f"name some of the model's linears: {known}"
            raise AdapterConfigError(field="rank_pattern", value=pattern, remedy=remedy)
