"""sentence-transformers' trainer trains an optimised encoder as a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertModel

import qlora_compile
from tests.libraries.twins import FORMAT, assert_equal, twins
from tests.test_equality import as_rewritten, lora
from tests.toy_language_model import toy_bert, toy_tokenizer

__all__ = ["as_rewritten"]

library: Any = pytest.importorskip(
    "sentence_transformers",
    reason="sentence-transformers is not installed; `make test-libraries` has it",
)

losses: Any = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

PAIRS = {
    "anchor": [f"what is {n}?" for n in range(6)],
    "positive": [f"{n} is a number." for n in range(6)],
}


def trainer(folder: Path) -> Any:
    model = library.SentenceTransformer(str(folder / "model"), device="cpu")
    torch.manual_seed(0)
    model.add_adapter(lora(target_modules=["query", "key", "value", "dense"]))
    options: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "optim": "sgd"}
    options |= {"use_cpu": True, "save_strategy": "no", "report_to": [], "learning_rate": 0.1}
    return library.SentenceTransformerTrainer(
        model=model,
        args=library.SentenceTransformerTrainingArguments(
            str(folder), per_device_train_batch_size=3, **options
        ),
        train_dataset=Dataset.from_dict(PAIRS),
        loss=losses.MultipleNegativesRankingLoss(model),
    )


def trained(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.usefixtures("as_rewritten")
def test_an_encoder_trains_as_stock(tmp_path: Path) -> None:
    config = toy_bert().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    stock, ours = twins(
        lambda: trainer(tmp_path),
        lambda made: qlora_compile.optimize_trainer(made, quantize=FORMAT, tune="off"),
    )
    expected = trained(stock)
    assert_equal(trained(ours), expected, ours.model)
