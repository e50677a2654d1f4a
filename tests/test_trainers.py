"""optimize_trainer optimises the trainer's model, at any time, and adapters have the dtype that
stock gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import qlora_compile
from qlora_compile.capture.regions import region_of
from tests.hf.test_trl import FORMAT, adapters, stock, trained, trainer_of
from tests.test_equality import _round_trip, without_inductor
from tests.toy_language_model import toy_llama
from tests.toy_models import tokens, toy, with_bitsandbytes

__all__ = ["without_inductor"]


def is_optimised(model: Any) -> bool:
    return any(region_of(module) is not None for module in model.modules())


@pytest.mark.usefixtures("without_inductor")
def test_the_trainer_s_model_trains_as_stock_whatever_came_first(tmp_path: Path) -> None:
    expected, _ = trained(stock("SFT", tmp_path))
    trainer = trainer_of("SFT", toy_llama(), tmp_path, adapters())
    trainer.create_optimizer_and_scheduler(2)
    for _ in range(2):
        found = qlora_compile.optimize_trainer(trainer, quantize=FORMAT, tune="off")
        assert found is trainer
    assert is_optimised(trainer.model)
    losses, _ = trained(trainer)
    assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.usefixtures("without_inductor")
def test_a_model_that_is_made_when_training_begins_is_optimised_then(tmp_path: Path) -> None:
    made: list[Any] = []

    def model_init() -> Any:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        made.append(get_peft_model(toy_llama(), config))
        return made[-1]

    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    trainer = Trainer(
        model_init=model_init,
        args=TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no"),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
    )
    qlora_compile.optimize_trainer(trainer, quantize=FORMAT, tune="off")
    trainer.train()
    assert len(made) == 2
    assert all(map(is_optimised, made))


@pytest.mark.usefixtures("without_inductor")
def test_one_of_two_losses_without_logits_is_used_and_named(tmp_path: Path) -> None:
    expected, _ = trained(stock("SFT", tmp_path))
    options: Any = {"quantize": FORMAT, "tune": "off", "logits_free_loss": True}
    model = qlora_compile.optimize(toy_llama(), adapters(), **options)
    assert qlora_compile.explain(model).loss == "computed without logits"
    trainer = trainer_of("SFT", model, tmp_path)
    losses, _ = trained(trainer)
    assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6)
    report = qlora_compile.explain(model)
    # TRL 1.16 has its forward in trl.trainer.utils, 1.14 in trl.trainer.sft_trainer.
    place = trainer.model.get_base_model().forward.__func__.__globals__["__name__"]
    assert place.startswith("trl.trainer.")
    assert report.loss is not None
    head, _, by = report.loss.partition("; ")
    assert head == f"left to the forward that {place} has put in place of the model's"
    assert by in ("", "log-probabilities by our kernel")  # TRL 1.14 computes them elsewhere
    assert f"loss: {report.loss}" in str(report)
    assert report.to_dict()["loss"] == report.loss


def seq2seq_losses(model: Any, rows: Any, folder: Path) -> list[float]:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    options: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "optim": "sgd", "seed": 3}
    options |= {"use_cpu": True, "save_strategy": "no", "report_to": [], "learning_rate": 0.5}
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(str(folder), **options),
        train_dataset=rows,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.usefixtures("without_inductor")
def test_a_sequence_to_sequence_trainer_trains_as_stock(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2}
    sizes |= {"num_heads": 4, "vocab_size": 128, "dropout_rate": 0.0}
    sizes["decoder_start_token_id"] = 0
    config = T5Config(**sizes)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(T5ForConditionalGeneration(config))
    # T5 wants these in float32, so that they are not packed.
    kept = {name: w.clone() for name, w in models[0].named_parameters() if ".wo." in name}
    _round_trip(models[0], FORMAT)
    models[0].load_state_dict(kept, strict=False)
    rows = [{"input_ids": row, "labels": row[:5]} for row in tokens(8, 12)]
    expected = seq2seq_losses(get_peft_model(models[0], adapters()), rows, tmp_path)
    ours = qlora_compile.optimize(models[1], adapters(), quantize=FORMAT, tune="off")
    assert seq2seq_losses(ours, rows, tmp_path) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert len(set(expected)) == 2
    assert all(site.fused for site in qlora_compile.explain(ours).sites if site.rank)


def dtypes(model: Any) -> set[torch.dtype]:
    return {p.dtype for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("bits", [None, 4])
def test_adapters_have_the_dtype_that_stock_gives_them(bits: int | None, tmp_path: Path) -> None:
    """TRL makes adapters bfloat16 where transformers has loaded the model in 4 or 8 bits, and PEFT
    keeps them float32 elsewhere."""
    found = []
    for optimised in (False, True):
        model = toy() if bits is None else with_bitsandbytes(toy(), bits)
        model.is_loaded_in_4bit = bits == 4
        model = get_peft_model(model, adapters())
        if optimised:
            model = qlora_compile.optimize(model, quantize=None if bits else FORMAT, tune="off")
        found.append(dtypes(trainer_of("SFT", model, tmp_path).model))
    assert found[0] == found[1] == {torch.bfloat16 if bits else torch.float32}
