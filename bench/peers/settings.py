"""The models that a comparison trains, and the settings of `make bench`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from bench.random_model import random_model
from bench.run import batches
from qlora_compile.hf import loading
from qlora_compile.training.demo import demo_model_file

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
SMOLLM2, STACK = "SmolLM2-135M", "Llama block stack"
LLAMA_1B, LLAMA_8B, EXPERTS = "Llama-3.2-1B", "Llama-3-8B", "Qwen3-30B-A3B"
_SHAPES = {
    STACK: (2048, 8192, 32, 8, 4096),
    LLAMA_1B: (2048, 8192, 32, 8, 128256),
    LLAMA_8B: (4096, 14336, 32, 8, 128256),
    EXPERTS: (2048, 6144, 32, 4, 151936),
}
"""Hidden and intermediate size, heads, key-value heads, vocabulary. The stack has the blocks of
Llama-3.2-1B and a small vocabulary, for the blocks are what is compared there."""

_EXPERT_SIZE = 768
"""The intermediate size of one expert."""


@dataclass(frozen=True)
class Setting:
    """What a comparison trains. layers, hidden, vocabulary, rank: sizes of a model with random
    weights, which keeps its own without `hidden` and `vocabulary`. autocast: whether to autocast
    to bfloat16, as the HF Trainer does with `bf16=True`. dtype: the model's, one of `DTYPES`.
    dropout: of the adapters."""

    model: str
    batch_size: int
    length: int
    layers: int = 4
    hidden: int | None = None
    vocabulary: int | None = None
    rank: int = RANK
    device: str = "cpu"
    autocast: bool = False
    checkpointing: bool = False
    dtype: str = "bfloat16"
    dropout: float = 0.0

    def __str__(self) -> str:
        layers = f", {self.layers} layers" if self.model in (LLAMA_1B, LLAMA_8B, EXPERTS) else ""
        checkpointing = ", checkpointing" if self.checkpointing else ""
        dtype = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        size = f"{self.batch_size} x {self.length}"
        return f"{self.model}{layers}, {size}{checkpointing}{dtype}{dropout}"

    @property
    def told(self) -> dict[str, Any]:
        """The fields that differ from their defaults: an older commit's code, which `--base` runs,
        may lack the others."""
        values = ((each, getattr(self, each.name)) for each in fields(self))
        return {each.name: value for each, value in values if value != each.default}

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length


SETTINGS = tuple(
    Setting(model, *batch) for model in (SMOLLM2, STACK) for batch in ((2, 256), (4, 512))
)


DTYPES = ("bfloat16", "float32", "float16")


def settings_in(dtype: str, dropout: float) -> tuple[Setting, ...]:
    """Return `SETTINGS` with the model in another dtype, and with dropout."""
    return tuple(replace(each, dtype=dtype, dropout=dropout) for each in SETTINGS)


def place(setting: Setting) -> tuple[int, float, int]:
    """Return the sorting key of a setting: by dtype, then by dropout, then as in `SETTINGS`."""
    usual = replace(setting, dtype=DTYPES[0], dropout=0.0)
    return DTYPES.index(setting.dtype), setting.dropout, SETTINGS.index(usual)


def base_model(setting: Setting) -> Any:
    """Return the model, the same in every process."""
    dtype = getattr(torch, setting.dtype)
    if setting.model == SMOLLM2:
        return loading.load_model(demo_model_file(), dtype=dtype).to(setting.device)
    model = random_model(_config(setting), setting.device, dtype)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _config(setting: Setting) -> PreTrainedConfig:
    *shape, _ = _SHAPES[setting.model]
    scale = (setting.hidden or shape[0]) / shape[0]
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes: dict[str, Any] = {
        name: max(int(size * scale), 1) for name, size in zip(names, shape, strict=True)
    }
    sizes |= {"num_hidden_layers": setting.layers, "vocab_size": _vocabulary(setting)}
    sizes["max_position_embeddings"] = 8192
    if setting.model == EXPERTS:
        sizes |= {"moe_intermediate_size": int(_EXPERT_SIZE * scale), "head_dim": 128}
        return Qwen3MoeConfig(**sizes)
    return LlamaConfig(**sizes, tie_word_embeddings=setting.model != LLAMA_8B)


def _vocabulary(setting: Setting) -> int:
    return setting.vocabulary or _SHAPES[setting.model][-1]


def data(setting: Setting, count: int) -> list[Tensor]:
    """Return `count` batches, int64 [batch_size, length]: text for a pretrained model, else
    random."""
    if setting.model == SMOLLM2:
        texts, _ = batches(count, setting.batch_size, setting.length)
        return [ids.to(setting.device) for ids in texts]
    generator = torch.Generator().manual_seed(1)
    size = (setting.batch_size, setting.length)
    rows = (torch.randint(_vocabulary(setting), size, generator=generator) for _ in range(count))
    return [ids.to(setting.device) for ids in rows]
