"""PyTorch Lightning's Trainer trains an optimised model as a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from tests.libraries.twins import assert_equal, optimised, twins
from tests.test_equality import as_rewritten, lora
from tests.toy_language_model import toy_llama
from tests.toy_models import tokens

__all__ = ["as_rewritten"]

lightning: Any = pytest.importorskip(
    "pytorch_lightning", reason="Lightning is not installed; `make test-libraries` has it"
)


class Module(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, ids: Tensor) -> Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.1)


def trained(model: Any, rows: Any, folder: Path) -> list[float]:
    module = Module(model)
    lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
    return module.losses


@pytest.mark.usefixtures("as_rewritten")
def test_a_model_trains_as_stock(tmp_path: Path) -> None:
    stock, ours = twins(lambda: get_peft_model(toy_llama(), lora()), optimised)
    rows = tokens(4, 12)
    expected = trained(stock, rows, tmp_path)
    assert_equal(trained(ours, rows, tmp_path), expected, ours)
    assert stock.state_dict().keys() - ours.state_dict().keys() == set()
