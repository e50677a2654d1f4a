"""The inventory: one walk through a model's modules per `optimize`, and true at each stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as torch_module

import qlora_compile
from qlora_compile.api import regions_of
from qlora_compile.errors import AlreadyOptimizedError
from qlora_compile.hf import adapters
from qlora_compile.hf.conv1d import as_linear
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.sites import Inventory
from tests.hf import test_experts
from tests.test_equality import lora
from tests.toy_models import toy, with_bitsandbytes

SOURCES = tuple(
    str(Path(__file__).parents[1] / name) for name in ("qlora_compile", "kernels", "passes")
)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of this package that have walked through a module with a list of blocks inside.

    Everything that torch has for it, `modules` as `parameters`, goes through `named_modules`.
    """
    found: list[str] = []
    original = nn.Module.named_modules

    def counting(self: nn.Module, memo: Any = None, *args: Any, **kwargs: Any) -> Any:
        if memo is None:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename == torch_module.__file__:
                frame = frame.f_back
            source = str(Path(frame.f_code.co_filename).resolve())
            whole = any(isinstance(each, nn.ModuleList) for _, each in original(self))
            if whole and source.startswith(SOURCES):
                found.append(f"{source}:{frame.f_lineno}")
        return original(self, memo, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    return found


KINDS = [(toy, lora), (test_experts.toy, test_experts.lora)]
OPTIONS = [{}, {"quantize": "nf4"}, {"quantize": "nf4", "strict": True}]


@pytest.mark.parametrize(("make", "config"), KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("peft", ["none", "given", "attached"])
def test_one_walk_and_two_where_peft_changes_the_model(
    walks: list[str], make: Any, config: Any, options: dict[str, Any], peft: str
) -> None:
    """With `lora` there is one more of the copy that PEFT's checks are tried on, and one of what
    PEFT made; strict puts the model's modes and buffers back."""
    model = make().requires_grad_(False)
    model = get_peft_model(model, config()) if peft == "given" else model
    walks.clear()
    model = qlora_compile.optimize(model, config() if peft == "attached" else None, **options)
    strict = "strict" in options
    assert len(walks) == (3 if peft == "attached" else 1) + strict, walks
    walks.clear()
    qlora_compile.explain(model)
    assert len(walks) == (1 if strict else 2), walks


def test_an_entry_tells_what_became_of_its_site() -> None:
    model = toy()
    inventory = Inventory(model)
    assert {entry.format for entry in inventory.linears.values()} == {"float32"}
    assert [e.name for e in inventory.linears.values() if e.kept is not None] == ["lm_head"]
    [entry, *others] = inventory.quantizable()
    assert len(others) == 13
    assert not entry.is_quantized
    inventory.replace(entry, QuantizedLinear.from_linear(as_linear(entry.module), "nf4"))
    assert entry.is_quantized
    assert entry.format == "nf4"
    assert model.get_submodule(entry.name) is entry.module is inventory.modules[entry.name]
    assert inventory.quantizable() == others


@pytest.mark.parametrize("make", [model for model, _ in KINDS])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_optimize_lists_is_what_a_new_inventory_lists(
    monkeypatch: pytest.MonkeyPatch, make: Any, quantize: str | None
) -> None:
    made: list[Inventory] = []
    original = Inventory.__init__

    def keeping(self: Inventory, model: nn.Module) -> None:
        original(self, model)
        made.append(self)

    monkeypatch.setattr(Inventory, "__init__", keeping)
    model = get_peft_model(make(), lora(target_modules=["q_proj", "v_proj"]))
    qlora_compile.optimize(model, quantize=quantize)
    [handed_on] = made
    fresh = Inventory(model)
    assert handed_on.linears == fresh.linears
    assert handed_on.experts == fresh.experts
    packed = {name for name, each in fresh.modules.items() if isinstance(each, QuantizedLinear)}
    assert packed <= handed_on.modules.keys()
    assert all(handed_on.modules[name] is fresh.modules[name] for name in packed)
    assert {each.adapted for each in fresh.linears.values()} == {False, True}


def test_tied_weights_are_kept_once() -> None:
    inventory = Inventory(toy(tie_word_embeddings=True))
    assert inventory.linears["lm_head"].kept == "its weight is tied to model.embed_tokens"
    shared = nn.Linear(8, 8)
    inventory = Inventory(nn.Sequential(shared, nn.Linear(8, 8), shared))
    assert list(inventory.linears) == list("01")
    assert inventory.linears["0"].kept == "its weight is tied to 2"
    assert inventory.linears["1"].kept is None


@pytest.mark.parametrize(("bits", "format"), [(4, "nf4"), (8, "int8")])
def test_adopted_layers_keep_their_entries(bits: int, format: str) -> None:
    model = qlora_compile.optimize(with_bitsandbytes(toy(), bits), lora())
    entries = Inventory(model).linears.values()
    adopted = [entry for entry in entries if entry.base is not None]
    assert len(adopted) == len(entries) - 1 == 14
    assert all(each.adapted and each.is_quantized and not each.obstacle for each in adopted)
    assert {each.format for each in adopted} == {format}
    assert not Inventory(model).quantizable()


def test_what_peft_trains_is_listed_once() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj", "lm_head"])
    model = qlora_compile.optimize(toy(), config, quantize="nf4")
    linears = Inventory(model).linears
    assert len(linears) == 15
    trained = {name.rpartition(".")[2] for name, each in linears.items() if each.left_alone}
    assert trained == {"down_proj", "lm_head"}
    assert sum(each.is_quantized for each in linears.values()) == 12


def test_layers_that_peft_repeats_are_listed() -> None:
    """Attaching changes the names: the first inventory would miss half of them."""
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], layer_replication=[(0, 2), (0, 2)]
    )
    model = qlora_compile.optimize(toy(), config)
    inventory = Inventory(adapters.base_model(model))
    assert len(regions_of(inventory)) == 4
    assert len(inventory.linears) == 4 * 7 + 1


def test_a_second_optimize_is_refused_and_lists_the_same() -> None:
    model = qlora_compile.optimize(toy(), quantize="nf4")
    before = Inventory(model)
    with pytest.raises(AlreadyOptimizedError):
        qlora_compile.optimize(model, quantize="nf4")
    after = Inventory(model)
    assert before.linears == after.linears
    assert before.modules == after.modules
    assert isinstance(model(input_ids=torch.tensor([[3, 4]])).logits, torch.Tensor)
