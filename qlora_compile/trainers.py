"""optimize_trainer: optimises the model that a Trainer of transformers, TRL or others trains."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from qlora_compile import api
from qlora_compile.errors import AlreadyOptimizedError


def optimize_trainer(trainer: Any, **options: Any) -> Any:
    """Optimise the model of `trainer` in place, and return the trainer.

    trainer: transformers' Trainer or a subclass, such as TRL's, whose model has its adapters; TRL's
    trainers attach adapters by peft_config. The trainer may have been made before or after
    `optimize`, and may have trained already. The model is optimised now if there is one, and again
    when training begins if the model has changed since, or if `model_init` makes another. options:
    those of `qlora_compile.optimize`, except lora. For a model that is optimised already and has
    not changed since, strict, verify, tune and logits_free_loss are ignored without a word: pass
    them to the call that optimises it.

    logits_free_loss changes nothing for TRL's trainers that compute the loss from the head's input
    themselves: SFT, DPO, KTO and GRPO. On a CPU, from TRL 1.15 on, our kernel computes what these
    need of a frozen head, with or without this option; `explain` says so.

    Raises a QloraCompileError for every bad option, before anything is changed.
    """

    def optimize(model: Any) -> None:
        with suppress(AlreadyOptimizedError):
            api.optimize(model, **options)

    from qlora_compile.hf.trainer_hook import BeforeTraining

    if trainer.model is not None:
        optimize(trainer.model)
    trainer.add_callback(BeforeTraining(optimize))
    return trainer
