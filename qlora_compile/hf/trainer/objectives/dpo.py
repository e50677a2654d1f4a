"""DPO (Rafailov et al. 2023): learns to prefer chosen answers to rejected ones."""

from typing import Any

from qlora_compile.hf.trainer.objectives.base import Objective


def _load() -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer, DPOConfig


DPO = Objective(name="dpo", kinds=("preference",), head="causal", load=_load)
