"""Cases of training in several processes by name, with models and data."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from peft import LoraConfig

import qlora_compile
from bench.stock import with_bitsandbytes
from tests.hf.test_experts import toy as toy_experts
from tests.toy_language_model import toy_llama

STEPS = 2
LEARNING_RATE = 0.1
ROWS = 4
EXPERTS = "mixtral"


@dataclass(frozen=True)
class Case:
    """base: a format, "16bit" (here float32, unquantised), or "bitsandbytes"."""

    engine: str
    base: str
    model: str
    checkpointing: str

    def __str__(self) -> str:
        return "-".join(astuple(self))

    @classmethod
    def parse(cls, text: str) -> Case:
        return cls(*text.split("-"))


def model_of(case: Case, tune: str = "model") -> Any:
    """Return the optimised toy model of `case`, the same in every process."""
    torch.manual_seed(0)
    experts = case.model == "experts"
    model: Any = toy_experts(EXPERTS) if experts else toy_llama()
    if case.base == "bitsandbytes":
        model = with_bitsandbytes(model, 4)
    if case.checkpointing == "checkpointed":
        model.gradient_checkpointing_enable()
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain = case.base in ("16bit", "bitsandbytes")
    return qlora_compile.optimize(
        model, lora, quantize=None if plain else case.base, tune=tune
    ).train()


def batch(number: int) -> torch.Tensor:
    """Return the token ids [ROWS, 16] of one step of all processes together."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 100, (ROWS, 16), generator=generator)
