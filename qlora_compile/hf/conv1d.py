"""transformers' Conv1D, the Linear of GPT-2 and its kin: its weight [K, N] is stored transposed."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

LinearSite = nn.Linear | Conv1D
"""What a site's base layer is."""


def features(linear: LinearSite) -> tuple[int, int]:
    """(N, K), whichever way the weight lies."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def as_linear(linear: LinearSite) -> nn.Linear:
    """`linear` itself, or the Linear that a Conv1D is, on the same memory."""
    if not isinstance(linear, Conv1D):
        return linear
    n, k = features(linear)
    seen = nn.Linear(k, n, device="meta").train(linear.training)
    seen.weight = nn.Parameter(linear.weight.t(), linear.weight.requires_grad)
    seen.bias = linear.bias
    return seen
