"""Small models of real architectures, and stock quantised versions of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench import stock

VOCABULARY = 128

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    # Whole blocks of 64 in every row: on AVX-512 CPUs bitsandbytes 0.50.2 decodes blocks that
    # straddle rows with the wrong absmax, a quarter of the weight's norm off.
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Gemma3": {"class": "Gemma3ForCausalLM", "config": "Gemma3TextConfig", "sliding_window": 16},
    "Mistral": {},
    "Phi3": {"without": ("head_dim",)},
    "GPTNeoX": {"without": ("num_key_value_heads", "head_dim")},
    "Bert": {
        "class": "BertForMaskedLM",
        "without": ("num_key_value_heads", "head_dim"),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}


def toy(architecture: str = "Llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return the architecture with two layers of width 64, seeded weights."""
    recipe = dict(ARCHITECTURES[architecture])
    model_class = recipe.pop("class", f"{architecture}ForCausalLM")
    config_class = recipe.pop("config", f"{architecture}Config")
    without = recipe.pop("without", ())
    arguments = {k: v for k, v in _SMALL.items() if k not in without} | recipe | options
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    model: Any = getattr(transformers, model_class)(config)
    # A bias of zero would hide a bias that is dropped.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def with_bitsandbytes(model: Any, bits: int) -> Any:
    """Return the Linears of a model, but for its head, as bitsandbytes' 4- or 8-bit ones."""
    return stock.without_repacking(stock.with_bitsandbytes(model, bits))


def tokens(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))
