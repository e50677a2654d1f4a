"""A causal language model of any shape with random weights, made without a float32 copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig


def random_model(config: PreTrainedConfig, device: str = "cpu") -> Any:
    """Return the model in bfloat16, the same for one config and device; norms are ones."""
    torch.manual_seed(0)
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config)
    model = empty.to(torch.bfloat16).to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model
