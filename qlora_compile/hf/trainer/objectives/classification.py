"""Classification: learns the label of a text."""

from typing import Any

from qlora_compile.hf.trainer.objectives.base import Objective


def _load() -> tuple[Any, Any]:
    from transformers import Trainer, TrainingArguments

    return Trainer, TrainingArguments


CLASSIFICATION = Objective(
    name="classification",
    kinds=("tokens", "classes"),
    head="classes",
    load=_load,
    keeps_learning_rate=False,
)
