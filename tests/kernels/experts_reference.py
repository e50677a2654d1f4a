"""The linear of experts by its definition, to compare variants and specification with."""

from __future__ import annotations

import torch
from torch import Tensor


def experts_reference(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """Return y [S, N] of x [S, K], weight [E, N, K], bias [E, N], lora_a [E, R, K], lora_b [E, N,
    R]: rows offsets[e - 1] … offsets[e] go through expert e, those past the last offset give
    zero."""
    expert = torch.searchsorted(offsets, torch.arange(x.shape[0]), right=True)
    served = expert < weight.shape[0]
    expert = expert.clamp(max=weight.shape[0] - 1)
    y = torch.einsum("snk,sk->sn", weight[expert], x)
    if bias is not None:
        y = y + bias[expert]
    if lora_a is not None and lora_b is not None:
        low = torch.einsum("srk,sk->sr", lora_a[expert], x)
        y = y + scaling * torch.einsum("snr,sr->sn", lora_b[expert], low)
    return y * served[:, None]
