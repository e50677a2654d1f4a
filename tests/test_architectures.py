"""Real architectures train under the HF Trainer with every target Linear fused, as stock does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import qlora_compile
from tests.test_equality import lora, without_inductor
from tests.toy_models import ARCHITECTURES, tokens, toy

__all__ = ["without_inductor"]


def losses(model, folder: Path, data: Any) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("without_inductor")
def test_trains_under_trainer_with_every_target_fused(architecture: str, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(6, 12)]
    runs = []
    for optimized in (False, True):
        model = toy(architecture)
        torch.manual_seed(1)
        model = get_peft_model(model, lora())
        if optimized:
            model = qlora_compile.optimize(model)
        runs.append(losses(model, tmp_path, data))
    assert len(runs[1]) == 3
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    report = qlora_compile.explain(model)
    adapted = [site for site in report.sites if site.rank]
    assert adapted
    assert all(site.fused for site in adapted), str(report)
    assert all(site.fused or site.reason for site in report.sites)
