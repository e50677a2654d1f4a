"""Slots that were up to date are refreshed after whatever may have changed them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch.nn.utils import parametrize

from qlora_compile.hf.adapter_slots import Slot
from qlora_compile.hf.adapters import adopt_adapter_layer
from qlora_compile.hf.slotted_adapters import SlottedAdapters

SITES = ("q", "k")


class Twice(nn.Module):
    def forward(self, weight: Any) -> Any:
        return 2 * weight


def adapted() -> Any:
    """Two adapted Linears in a PeftModel, with a second adapter that is not active."""
    block = nn.ModuleDict({name: nn.Linear(6, 5) for name in SITES})
    config = LoraConfig(r=2, target_modules=list(SITES), lora_dropout=0.25)
    model: Any = get_peft_model(block, config).train()  # pyright: ignore[reportArgumentType]
    model.add_adapter("other", copy.copy(config))
    for name in SITES:
        adopt_adapter_layer(model.base_model.model[name])
    return model


def _weights(model: Any) -> Any:
    return model.base_model.model["q"].lora_A["default"]


def _parametrized(model: Any) -> None:
    parametrize.register_parametrization(_weights(model), "weight", Twice())


def _scaling(model: Any) -> None:
    model.base_model.model["k"].scaling["default"] = 3.5


def _new_weight(model: Any) -> None:
    _weights(model).weight = nn.Parameter(torch.ones(2, 6))


def _bias(model: Any) -> None:
    model.base_model.model["q"].lora_B["default"].bias = nn.Parameter(torch.ones(5))


def _dropout(model: Any) -> None:
    model.base_model.model["q"].lora_dropout["default"].p = 0.5


def _forgotten(model: Any) -> None:
    model.base_model.model["q"].forget_slots()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "scaling": _scaling,
    "another weight": _new_weight,
    "a bias": _bias,
    "probability": _dropout,
    "evaluation": lambda model: model.eval(),
    "float64": lambda model: model.to(torch.float64),
    "another adapter": lambda model: model.set_adapter("other"),
    "both adapters": lambda model: model.base_model.set_adapter(["default", "other"]),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(["default"]),
    "deleted": lambda model: (model.set_adapter("other"), model.delete_adapter("default")),
    "computed": _parametrized,
    "another class": lambda model: setattr(
        _weights(model), "__class__", type("Own", (nn.Linear,), {})
    ),
    "forgotten": _forgotten,
}


def _told(slots: tuple[Slot, ...] | None) -> Any:
    if slots is None:
        return None
    return [
        (
            id(each.a),
            id(each.b),
            id(each.bias),
            each.scaling.item(),
            each.scaling.dtype,
            each.dropout,
        )
        for each in slots
    ]


@pytest.mark.parametrize("change", CHANGES)
def test_slots_follow_what_changes(change: str) -> None:
    model = adapted()
    block = model.base_model.model
    adapters = SlottedAdapters(block, SITES)
    for _ in range(2):
        adapters.refresh(by_slots=True)
    before = [_told(block[name].slots) for name in SITES]
    CHANGES[change](model)
    if change in ("deleted", "computed"):
        # Modules that came or went are for the caller to see.
        adapters.forget()
    adapters.refresh(by_slots=True)
    found = [_told(block[name].slots) for name in SITES]
    SlottedAdapters(block, SITES).refresh(by_slots=True)
    assert found == [_told(block[name].slots) for name in SITES]
    assert (found == before) == (change in ("nothing", "forgotten"))


def _filled(scaling: Any) -> None:
    scaling.fill_(3.5)


def _halved(scaling: Any) -> None:
    scaling.mul_(0.5)


@pytest.mark.parametrize("write", [_filled, _halved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_follow_what_is_written_to_a_scaling(write: Any, dtype: torch.dtype) -> None:
    """PEFT's hotswap makes tensors of scalings and writes to them."""
    model = adapted().to(dtype)
    prepare_model_for_compiled_hotswap(model)
    block = model.base_model.model
    adapters = SlottedAdapters(block, SITES)
    for name in (*SITES, *SITES):
        for _ in range(2):
            adapters.refresh(by_slots=True)
        write(block[name].scaling["default"])
        adapters.refresh(by_slots=True)
        for each in SITES:
            (slot,) = block[each].slots
            assert slot.scaling.item() == block[each].scaling["default"].item()
            assert slot.scaling.dtype == dtype


def test_a_refresh_that_is_not_by_slots_is_not_passed_over() -> None:
    block = adapted().base_model.model
    adapters = SlottedAdapters(block, SITES)
    adapters.refresh(by_slots=True)
    adapters.refresh(by_slots=False)
    assert block["q"].slots is None
    adapters.refresh(by_slots=True)
    assert block["q"].slots
