"""A reward model: learns to give chosen answers a higher score than rejected ones."""

from typing import Any

from qlora_compile.hf.trainer.objectives.base import Objective


def _load() -> tuple[Any, Any]:
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer, RewardConfig


REWARD = Objective(name="reward", kinds=("preference",), head="score", load=_load)
