"""What is trained in the comparison: two models in bfloat16, two batches each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from bench.random_llama import random_llama
from bench.run import batches
from qlora_compile.demo import demo_model_file
from qlora_compile.hf import loading

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
SMOLLM2, STACK = "SmolLM2-135M", "Llama block stack"
STACK_SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
"""Llama-3.2-1B's blocks; a small vocabulary, for the blocks are what is compared here."""


@dataclass(frozen=True)
class Setting:
    """layers, hidden, rank: of the stack, for scaling curves."""

    model: str
    batch_size: int
    length: int
    layers: int = 4
    hidden: int = STACK_SHAPE["hidden_size"]
    rank: int = RANK

    def __str__(self) -> str:
        return f"{self.model}, {self.batch_size} x {self.length}"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length


SETTINGS = tuple(
    Setting(model, *batch) for model in (SMOLLM2, STACK) for batch in ((2, 256), (4, 512))
)


def base_model(setting: Setting) -> Any:
    """The model in bfloat16, the same in every process."""
    if setting.model == SMOLLM2:
        return loading.load_model(demo_model_file(), dtype=torch.bfloat16)
    scale = setting.hidden / STACK_SHAPE["hidden_size"]
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    scaled = {name: max(int(STACK_SHAPE[name] * scale), 1) for name in sizes}
    return random_llama(LlamaConfig(num_hidden_layers=setting.layers, **{**STACK_SHAPE, **scaled}))


def data(setting: Setting, steps: int) -> list[Tensor]:
    """int64 [batch_size, length] for each step: text for a pretrained model, else random tokens."""
    if setting.model == SMOLLM2:
        return batches(steps, setting.batch_size, setting.length)[0]
    generator = torch.Generator().manual_seed(1)
    size = (setting.batch_size, setting.length)
    vocabulary = STACK_SHAPE["vocab_size"]
    return [torch.randint(vocabulary, size, generator=generator) for _ in range(steps)]
