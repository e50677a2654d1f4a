"""Real architectures train under the HF Trainer with every target Linear fused, as stock does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainingArguments

import qlora_compile
from qlora_compile.modules.linear import QuantizedLinear
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
    torch.manual_seed(1)
    ours = qlora_compile.optimize(toy(architecture), lora(), quantize="nf4")
    torch.manual_seed(1)
    stock = get_peft_model(toy(architecture), lora())
    with_decoded_weights(stock, ours)
    expected = losses(stock, tmp_path, data)
    assert len(expected) == 3
    assert losses(ours, tmp_path, data) == pytest.approx(expected, rel=1e-4)
    report = qlora_compile.explain(ours)
    targets = [name for name, module in stock.named_modules() if isinstance(module, LoraLayer)]
    assert [site.name for site in report.sites if site.fused and site.rank] == targets
    assert {site.format for site in report.sites if ".layer" in site.name} == {"nf4"}
    assert all(site.fused or site.reason for site in report.sites)


def with_decoded_weights(stock: nn.Module, ours: nn.Module) -> None:
    """Give `stock` the values that `ours` decodes."""
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            stock.get_submodule(name).weight.data = module.dequantize()
