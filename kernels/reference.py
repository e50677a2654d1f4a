"""The fused linear in plain torch: the specification every variant is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def qlora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling * (keep ⊙ x / (1 - dropout)) Aᵀ Bᵀ  (LoRA, Hu et al. 2021).

    x [..., K], weight [N, K] (dequantised), lora_a [R, K], lora_b [N, R], keep bool [..., K]. Every
    product runs in the dtype of its weights and the sum in the wider one, as in PEFT: pass float64
    for a reference, low precisions for the plain computation whose error bounds a variant's.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    adapter_x = x.to(lora_a.dtype)
    dropped = adapter_x if keep is None else adapter_x * keep / (1.0 - dropout)
    return y + scaling * (dropped @ lora_a.T @ lora_b.T)
