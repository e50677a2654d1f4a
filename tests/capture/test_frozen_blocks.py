"""Blocks before the first trained one are not differentiated, as by stock PEFT: saved bytes, and
outputs that require no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
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


def _off_below(model: Any, act: Any) -> None:
    for block in model.get_decoder().layers[:2]:
        for module in block.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                act(module)


OFF: dict[str, Any] = {
    "disabled": lambda model: _off_below(model, lambda layer: layer.enable_adapters(False)),
    "merged": lambda model: _off_below(
        model, lambda layer: layer.merge() if isinstance(layer, BaseTunerLayer) else None
    ),
    "not active": lambda model: model.set_adapter("last"),
}
"""Ways in which adapters take no part in the first two blocks."""


@pytest.mark.parametrize("copied", [None, ["post_attention_layernorm"]], ids=["adapters", "copies"])
@pytest.mark.parametrize("off", OFF)
def test_a_block_whose_adapters_are_off_is_not_differentiated(
    off: str, copied: list[str] | None
) -> None:
    """copied: modules that PEFT trains a copy of. All that PEFT could train require a gradient."""
    config = LoraConfig(target_modules=ATTENTION, init_lora_weights=False, modules_to_save=copied)
    last = LoraConfig(target_modules=ATTENTION, init_lora_weights=False, layers_to_transform=[2])
    differentiated: list[list[bool]] = []
    steps = []
    for optimized in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(toy(num_hidden_layers=3), config).train()
        model.add_adapter("last", last)
        if optimized:
            qlora_compile.optimize(model, tune="off")
        OFF[off](model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
        found: list[bool] = []
        for block in model.get_decoder().layers:
            block.register_forward_hook(lambda *call, f=found: f.append(call[2].requires_grad))
        steps.append(step(model, batch(model.get_base_model())))
        differentiated.append(found)
    (expected, stock_bytes), (actual, our_bytes) = steps
    assert differentiated[1] == differentiated[0]
    assert differentiated[0] == [copied is not None and off == "merged"] * 2 + [True]
    assert actual.keys() == expected.keys()
    for name, error in distance(actual, expected).items():
        assert error < 1e-4, name
    assert our_bytes <= 1.05 * stock_bytes
