"""KTO (Ethayarajh et al. 2024): learns from single answers, each judged good or bad."""

from typing import Any

from qlora_compile.hf.trainer.objectives.base import Objective


def _load() -> tuple[Any, Any]:
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer, KTOConfig


KTO = Objective(name="kto", kinds=("judged",), head="causal", load=_load)
