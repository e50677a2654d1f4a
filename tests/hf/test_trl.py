"""TRL's trainers over an optimised model, whoever comes first: losses and weights as over a stock
model of the same decoded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from transformers import LlamaForSequenceClassification

import qlora_compile
from qlora_compile.modules.linear import QuantizedLinear
from tests.examples import LONG
from tests.test_equality import _round_trip, lora, without_inductor
from tests.toy_language_model import toy_llama, toy_tokenizer

__all__ = ["without_inductor"]

trl: Any = pytest.importorskip("trl")
pytest.importorskip("trl.experimental.orpo")

FORMAT = "nf4"
PROMPTS = ["hello ", "good ", "ab ", "x "]
GOOD = ["world", "day", "cd", "y"]
BAD = ["earth", "q", "night", "zz"]


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


TRAINERS: dict[str, tuple[dict[str, list[Any]], dict[str, Any], dict[str, Any]]] = {
    "SFT": (
        {"text": [prompt + good for prompt, good in zip(PROMPTS, GOOD, strict=True)]},
        {"gradient_checkpointing": True},
        {},
    ),
    # Between the forward and the backward these two compute a reference without the adapters.
    "DPO": (
        {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD},
        {"gradient_checkpointing": True},
        {},
    ),
    "KTO": (
        {"prompt": PROMPTS, "completion": GOOD, "label": [True, False] * 2},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        {},
    ),
    "Reward": ({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}, {}, {}),
    "ORPO": ({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}, {}, {}),
    "GRPO": (
        {"prompt": PROMPTS},
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
        {"reward_funcs": reward},
    ),
}
"""Of each: columns of the data, options of its config, arguments."""

LOG_PROBABILITIES = ("SFT", "DPO", "KTO", "GRPO")
"""Those that make their loss of the log-probabilities of labels."""


def trainer_of(name: str, model: Any, folder: Path, peft_config: Any = None) -> Any:
    columns, options, arguments = TRAINERS[name]
    config = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "optim": "sgd",  # Adam's first steps turn the rounding of small gradients into large ones
        "learning_rate": 1.0,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    home = trl.experimental.orpo if name == "ORPO" else trl
    return getattr(home, f"{name}Trainer")(
        model,
        args=getattr(home, f"{name}Config")(**(config | options)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=toy_tokenizer(),
        peft_config=peft_config,
        **arguments,
    )


def adapters(name: str = "SFT") -> Any:
    task = "SEQ_CLS" if name == "Reward" else None  # with it PEFT trains the head
    return lora(init_lora_weights=True, task_type=task)


def model_of(name: str) -> Any:
    if name != "Reward":
        return toy_llama()
    torch.manual_seed(0)
    config: Any = toy_llama().config
    config.num_labels, config.pad_token_id = 1, toy_tokenizer().pad_token_id
    return LlamaForSequenceClassification(config)


def model_first(name: str, folder: Path) -> Any:
    model = qlora_compile.optimize(model_of(name), adapters(name), quantize=FORMAT, tune="off")
    return trainer_of(name, model, folder)


def peft_config(name: str, folder: Path) -> Any:
    model = qlora_compile.optimize(model_of(name), quantize=FORMAT, tune="off")
    return trainer_of(name, model, folder, adapters(name))


def trainer_first(name: str, folder: Path) -> Any:
    trainer = trainer_of(name, model_of(name), folder, adapters(name))
    assert qlora_compile.optimize(trainer.model, quantize=FORMAT, tune="off") is trainer.model
    return trainer


Order = Callable[[str, Path], Any]
ORDERS: tuple[Order, ...] = (model_first, peft_config, trainer_first)


def stock(name: str, folder: Path) -> Any:
    model = model_of(name)
    heads = {name: weight.clone() for name, weight in model.named_parameters() if "score" in name}
    _round_trip(model, FORMAT)
    model.load_state_dict(heads, strict=False)  # no head is packed
    return trainer_of(name, model, folder, adapters(name))


def trained(trainer: Any) -> tuple[list[float], Any]:
    """Return the losses of the steps, and the model with its adapter merged."""
    generator = torch.Generator().manual_seed(5)
    for module in trainer.model.modules():
        if isinstance(module, LoraLayer):
            weight: Any = module.lora_A["default"].weight
            torch.nn.init.normal_(weight, std=0.2, generator=generator)
    torch.manual_seed(6)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.model


CASES = [
    (name, order)
    for i, name in enumerate(TRAINERS)
    for j, order in enumerate(ORDERS)
    if LONG or (i + j) % 3 == 2  # in the plain suite each trainer in one order
]


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    ("name", "order"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_trains_and_merges_as_stock(name: str, order: Order, tmp_path: Path) -> None:
    expected, plain = trained(stock(name, tmp_path))
    losses, model = trained(order(name, tmp_path))
    assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert len(set(expected)) == 2
    report = qlora_compile.explain(model)
    if name in LOG_PROBABILITIES and hasattr(trl.kernels, "ChunkedLogProbFunction"):
        assert report.loss is not None
        assert report.loss.endswith("log-probabilities by our kernel")
    else:
        assert report.loss is None
    head = "score" if name == "Reward" else "lm_head"
    assert [site.name for site in report.sites if not site.fused] == [f"base_model.model.{head}"]
    plain, model = plain.merge_and_unload(), model.merge_and_unload()
    assert isinstance(plain, type(model_of(name)))
    for path, linear in model.named_modules():
        if isinstance(linear, QuantizedLinear):
            merged = copy.deepcopy(linear)
            weight: Any = plain.get_submodule(path).weight
            merged.requantize(weight.data)
            difference = linear.dequantize() - merged.dequantize()
            assert difference.norm() < 0.02 * merged.dequantize().norm(), path
