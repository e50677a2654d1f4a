"""transformers' Conv1D, the linear layer of GPT-2 and similar models, with a weight [K, N]."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

LinearSite = nn.Linear | Conv1D
"""The type of a site's base layer."""


def features(linear: LinearSite) -> tuple[int, int]:
    """Return (N, K), that is, (outputs, inputs)."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def as_linear(linear: LinearSite) -> nn.Linear:
    """Return `linear` itself, or for a Conv1D an equivalent nn.Linear on the same memory."""
    if not isinstance(linear, Conv1D):
        return linear
    n, k = features(linear)
    view = nn.Linear(k, n, device="meta").train(linear.training)
    view.weight = nn.Parameter(linear.weight.t(), linear.weight.requires_grad)
    view.bias = linear.bias
    return view
