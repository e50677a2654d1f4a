"""Distances between models on the same text: logits, their divergence, and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_compile.hf.merging.merged_tensors import MergedTensors
from qlora_compile.kernels.experts.base import PACKED_EXPERTS
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.packed import PackedModule


@dataclass(frozen=True)
class Distance:
    """How far a model's outputs are from those of the trained one.

    logits: Euclidean norm of the difference of all logits, divided by that of the trained model's.
    divergence: Kullback-Leibler divergence from the trained model's distribution of the next token,
    the mean over tokens, in nats. loss: the model's own, the mean over tokens, in nats.
    """

    logits: float
    divergence: float
    loss: float


@torch.no_grad()
def distances(
    trained: Callable[[Tensor], Tensor],
    others: Sequence[Callable[[Tensor], Tensor]],
    sequences: Sequence[Sequence[int]],
    device: torch.device,
) -> tuple[float, list[Distance]]:
    """Return the trained model's loss, and the Distance of each of the `others` from it.

    A model is given ids [1, T] and returns logits [1, T, V]. One sequence is computed at a time.
    """
    norm = loss = 0.0
    sums = [[0.0, 0.0, 0.0] for _ in others]
    tokens = sum(len(sequence) - 1 for sequence in sequences)
    for sequence in sequences:
        ids = torch.tensor([sequence], device=device)
        expected = trained(ids).double()
        log_expected = expected.log_softmax(-1)
        norm += float(expected.square().sum())
        loss += _loss(log_expected, ids)
        for model, each in zip(others, sums, strict=True):
            found = model(ids).double()
            log_found = found.log_softmax(-1)
            each[0] += float((found - expected).square().sum())
            gap = (log_expected.exp() * (log_expected - log_found)).sum(-1)
            each[1] += float(gap[:, :-1].sum())
            each[2] += _loss(log_found, ids)
    return loss / tokens, [
        Distance((square / norm) ** 0.5, gap / tokens, own / tokens) for square, gap, own in sums
    ]


def _loss(log_probabilities: Tensor, ids: Tensor) -> float:
    """Return the summed loss of the tokens after the first."""
    chosen = log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])
    return -float(chosen.sum())


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model in evaluation, as a function of ids that returns logits."""
    return lambda ids: model(input_ids=ids).logits


def logits_without_adapters(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the base of a model with adapters, as a function of ids that returns logits."""

    def base(ids: Tensor) -> Tensor:
        with without_adapters(model):
            return model(input_ids=ids).logits

    return base


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Disable the adapters of a PeftModel, or those that transformers has attached."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    elif getattr(model, "_hf_peft_config_loaded", False):
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()
    else:
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation inside the context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def repacking_error(
    merged: MergedTensors, base: MergedTensors, repacked: nn.Module
) -> float | None:
    """Return what packing the merged weights again costs, relative to what the adapters changed.

    That is ‖packed - merged‖ / ‖merged - base‖ over all packed weights that adapters changed; None
    if they changed none. merged, base: MergedTensors with and without the adapters.
    """
    cost = change = 0.0
    for path, module in repacked.named_modules():
        if not isinstance(module, PackedModule):
            continue
        is_experts = isinstance(module, PackedExperts)
        name = path.removesuffix(PACKED_EXPERTS) if is_experts else f"{path}.weight"
        whole, before = merged.value(name).float(), base.value(name).float()
        moved = float((whole - before).norm()) ** 2
        if moved:
            decoded = module.parameter() if is_experts else module.dequantize()
            # A Conv1D is packed as a Linear.
            decoded = decoded if decoded.shape == whole.shape else decoded.t()
            cost += float((decoded.to(whole.device).float() - whole).norm()) ** 2
            change += moved
    return (cost / change) ** 0.5 if change else None
