"""What is trained in the comparison, in bfloat16: on a CPU two models, two batches each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from bench.random_llama import random_llama
from bench.run import batches
from qlora_compile.hf import loading
from qlora_compile.training.demo import demo_model_file

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOLLM2, STACK, LARGE_STACK = "SmolLM2-135M", "Llama block stack", "Llama-3-8B block stack"
_SHAPES = {STACK: (2048, 8192, 32, 8), LARGE_STACK: (4096, 14336, 32, 8)}
"""Llama-3.2-1B's blocks and Llama-3-8B's: hidden and intermediate size, heads, key-value heads."""

_VOCABULARY = 4096
"""A small one, for the blocks are what is compared here."""


@dataclass(frozen=True)
class Setting:
    """layers, hidden, rank: of a stack, for scaling curves; its own width without `hidden`."""

    model: str
    batch_size: int
    length: int
    layers: int = 4
    hidden: int | None = None
    rank: int = RANK

    def __str__(self) -> str:
        return f"{self.model}, {self.batch_size} x {self.length}"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length


_ON_CPU = tuple(
    Setting(model, *batch) for model in (SMOLLM2, STACK) for batch in ((2, 256), (4, 512))
)
SETTINGS = _ON_CPU if DEVICE == "cpu" else (Setting(STACK, 4, 512), Setting(LARGE_STACK, 4, 2048))


def base_model(setting: Setting) -> Any:
    """The model in bfloat16, the same in every process."""
    if setting.model == SMOLLM2:
        return loading.load_model(demo_model_file(), dtype=torch.bfloat16).to(DEVICE)
    shape = _SHAPES[setting.model]
    scale = (setting.hidden or shape[0]) / shape[0]
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: max(int(size * scale), 1) for name, size in zip(names, shape, strict=True)}
    config = LlamaConfig(
        num_hidden_layers=setting.layers,
        vocab_size=_VOCABULARY,
        tie_word_embeddings=True,
        **sizes,  # pyright: ignore[reportArgumentType]
    )
    return random_llama(config, DEVICE)


def data(setting: Setting, steps: int) -> list[Tensor]:
    """int64 [batch_size, length] for each step: text for a pretrained model, else random tokens."""
    if setting.model == SMOLLM2:
        texts, _ = batches(steps, setting.batch_size, setting.length)
        return [ids.to(DEVICE) for ids in texts]
    generator = torch.Generator().manual_seed(1)
    size = (setting.batch_size, setting.length)
    rows = (torch.randint(_VOCABULARY, size, generator=generator) for _ in range(steps))
    return [ids.to(DEVICE) for ids in rows]
