"""ORPO (Hong et al. 2024): learns chosen answers, and avoids rejected ones by their odds ratio."""

from typing import Any

from qlora_compile.hf.trainer.objectives.base import Objective


def _load() -> tuple[Any, Any]:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig


ORPO = Objective(name="orpo", kinds=("preference",), head="causal", load=_load)
