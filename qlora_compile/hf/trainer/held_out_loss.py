"""Losses of held-out rows, each for itself where the objective gives each row a loss."""

from __future__ import annotations

from typing import Any

import torch


def held_out_losses(trainer: Any) -> list[float]:
    """Return the mean loss, in nats per token that is learnt, of each row of the trainer's
    evaluation dataset; for objectives other than supervised fine-tuning the mean over all rows.
    """
    rows = trainer.eval_dataset
    if rows is None:
        return []
    if not hasattr(trainer, "completion_only_loss"):  # an attribute of TRL's SFTTrainer
        return [float(trainer.evaluate()["eval_loss"])]
    return row_losses(trainer.model, rows)


@torch.no_grad()
def row_losses(model: Any, rows: Any) -> list[float]:
    """Return the mean loss of each row of input_ids and labels, in evaluation mode.

    The model's training mode is restored. Rows go through the model one by one: logits of several
    would be the largest tensors of a training.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: list[float] = []
    try:
        for row in rows:
            ids, labels = (
                torch.tensor(row[name], device=device) for name in ("input_ids", "labels")
            )
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, labels[1:]).item())
    finally:
        model.train(was_training)
    return losses
