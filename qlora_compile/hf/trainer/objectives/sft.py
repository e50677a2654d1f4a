"""Supervised fine-tuning: learns the answers of chats, completions, or whole texts."""

from typing import Any

from qlora_compile.hf.trainer.objectives.base import Objective


def _load() -> tuple[Any, Any]:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer, SFTConfig


SFT = Objective(
    name="sft",
    kinds=("tokens", "messages", "conversations", "completion", "instruction", "text"),
    head="causal",
    load=_load,
    defaults={"eval_packing": False},  # so that each held-out row has a loss of its own
    keeps_learning_rate=False,
)
