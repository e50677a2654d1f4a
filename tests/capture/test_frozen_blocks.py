"""Blocks before the first trained one are not differentiated: saved bytes beside stock PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

import qlora_compile
from bench.agreement import distance
from bench.coverage.kinds import KINDS, batch, built
from tests.test_equality import without_inductor
from tests.toy_models import toy

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")

ATTENTION = ["q_proj", "v_proj"]
FROZEN: dict[str, Any] = {
    "the last layer's adapters": (
        lambda: toy(num_hidden_layers=4),
        {"target_modules": ATTENTION, "layers_to_transform": [3]},
    ),
    "a frozen vision tower": (
        lambda: built(KINDS["llava"]),
        {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
    ),
    "a frozen encoder": (
        lambda: built(KINDS["t5-seq2seq"]),
        {"target_modules": r".*decoder\..*SelfAttention\.(q|v)"},
    ),
}


def step(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """Return loss and gradients of a step, and the bytes that autograd saved, without weights."""
    saved: dict[int, int] = {}
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()[None]} | gradients, sum(saved.values())


@pytest.mark.parametrize("case", FROZEN)
def test_a_frozen_block_is_not_differentiated(case: str) -> None:
    make, options = FROZEN[case]
    config = LoraConfig(r=4, init_lora_weights=False, **options)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(get_peft_model(make(), config).train())
    stock, ours = models
    qlora_compile.optimize(ours, tune="off")
    inputs = batch(stock.get_base_model())
    (expected, stock_bytes), (actual, our_bytes) = step(stock, inputs), step(ours, inputs)
    for name, error in distance(actual, expected).items():
        assert error < 1e-4, name
    assert our_bytes <= 1.05 * stock_bytes
