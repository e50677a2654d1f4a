"""The models that are trained to measure the host, so small that computing takes no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from bench.host.sizes import (
    EXPERTS,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KEY_VALUE_HEADS,
    LENGTH,
    RANK,
    VOCABULARY,
)
from bench.random_model import random_model

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": 4 * LENGTH,
    "use_cache": False,
}


@dataclass(frozen=True)
class TinyModel:
    """A model's name and config, and the weights of experts that get adapters too."""

    name: str
    config: Callable[..., PreTrainedConfig]
    experts: tuple[str, ...] = ()

    def build(self, layers: int) -> Any:
        """Return the model in bfloat16 with random weights."""
        config = self.config(**_SIZES, num_hidden_layers=layers)
        if self.experts:
            # What transformers takes on a GPU; on a CPU it would go from expert to expert.
            config._experts_implementation = "grouped_mm"
        return random_model(config)

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules="all-linear",
            target_parameters=list(self.experts) or None,
        )


def _mixture_of_experts(**sizes: Any) -> PreTrainedConfig:
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    sizes |= {"moe_intermediate_size": INTERMEDIATE // 2, "head_dim": width}
    return Qwen3MoeConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=2)


LLAMA = TinyModel("Llama", LlamaConfig)
MIXTURE = TinyModel(
    "mixture of experts", _mixture_of_experts, ("experts.gate_up_proj", "experts.down_proj")
)
MODELS = {each.name: each for each in (LLAMA, MIXTURE)}
