"""Group Relative Policy Optimization (Shao et al. 2024): writes answers and learns from rewards."""

from typing import Any

from qlora_compile.hf.trainer.objectives.base import Objective


def _load() -> tuple[Any, Any]:
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer, GRPOConfig


GRPO = Objective(name="grpo", kinds=("prompt",), head="causal", load=_load, needs_reward=True)
