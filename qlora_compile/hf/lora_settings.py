"""LoRA's settings: checks them and makes PEFT's configuration for a model."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from qlora_compile.errors import AdaptersPresentError, ModelTypeError, OutOfRangeError
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


def require_adapter_settings(rank: object, alpha: object, dropout: object) -> None:
    """Check LoRA's rank, alpha and dropout.

    Raises:
        OutOfRangeError: one of them cannot be used.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise OutOfRangeError(name="rank", value=rank, allowed="an integer of 1 or more")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise OutOfRangeError(name="alpha", value=alpha, allowed="a number above 0")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise OutOfRangeError(name="dropout", value=dropout, allowed="a number from 0 to below 1")


def lora_config(
    model: Any, *, rank: int, alpha: float, dropout: float, target_modules: Any, **others: Any
) -> LoraConfig:
    """Return PEFT's configuration for a model; it also trains the new head of a classifier.

    others: other arguments of LoraConfig, such as use_dora and rank_pattern.

    Raises:
        OutOfRangeError: rank, alpha or dropout cannot be used.
    """
    require_adapter_settings(rank, alpha, dropout)
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
