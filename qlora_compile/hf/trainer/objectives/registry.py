"""All objectives, by name."""

from __future__ import annotations

from qlora_compile.data_errors import ObjectiveNameError
from qlora_compile.hf.trainer.objectives.base import Objective
from qlora_compile.hf.trainer.objectives.classification import CLASSIFICATION
from qlora_compile.hf.trainer.objectives.dpo import DPO
from qlora_compile.hf.trainer.objectives.grpo import GRPO
from qlora_compile.hf.trainer.objectives.kto import KTO
from qlora_compile.hf.trainer.objectives.orpo import ORPO
from qlora_compile.hf.trainer.objectives.reward import REWARD
from qlora_compile.hf.trainer.objectives.sft import SFT

OBJECTIVES = (SFT, DPO, KTO, ORPO, GRPO, REWARD, CLASSIFICATION)


def objective_named(name: str) -> Objective:
    """Return an objective.

    Raises:
        ObjectiveNameError: there is none of that name.
    """
    for objective in OBJECTIVES:
        if objective.name == name:
            return objective
    raise ObjectiveNameError(value=name, known=", ".join(each.name for each in OBJECTIVES))
