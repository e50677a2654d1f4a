"""optimize_trainer: the trainer's model is optimised, whenever that is asked for, and adapters have
the dtype that stock gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import qlora_compile
from qlora_compile.capture.regions import region_of
from tests.hf.test_trl import FORMAT, adapters, stock, trained, trainer_of
from tests.test_equality import without_inductor
from tests.toy_language_model import toy_llama
from tests.toy_models import toy, with_bitsandbytes

__all__ = ["without_inductor"]


def is_optimised(model: Any) -> bool:
    return any(region_of(module) is not None for module in model.modules())


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("moment", ["before training", "after an optimizer", "twice"])
def test_the_trainer_s_model_trains_as_stock_whatever_the_moment(
    moment: str, tmp_path: Path
) -> None:
    expected, _ = trained(stock("SFT", tmp_path))
    trainer = trainer_of("SFT", toy_llama(), tmp_path, adapters())
    if moment == "after an optimizer":
        trainer.create_optimizer_and_scheduler(2)
    for _ in range(1 + (moment == "twice")):
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
