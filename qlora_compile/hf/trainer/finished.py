"""A training that was stopped after its last step, before its results were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput


def is_finished(trainer: Any, checkpoint: str) -> bool:
    """Whether a checkpoint is of the last step. The Trainer would train one more."""
    last = trainer.args.max_steps
    if not isinstance(trainer.model, PeftModel):
        return False
    if last <= 0:
        *_, last = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return _state(checkpoint).global_step >= last


def load_finished(trainer: Any, checkpoint: str) -> TrainOutput:
    """Give a Trainer the adapters and the history of a checkpoint of the last step, or the adapters
    of the best one if it is to end with that."""
    trainer.state = state = _state(checkpoint)
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    device = str(next(trainer.model.parameters()).device)
    set_peft_model_state_dict(trainer.model, load_peft_weights(best or checkpoint, device=device))
    return TrainOutput(state.global_step, float("nan"), {})


def _state(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
