"""Adapters attached after `optimize`, in every way PEFT has: as those of stock PEFT."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

import qlora_compile
from qlora_compile.modules.linear import QuantizedLinear
from tests.hf import test_experts as experts
from tests.test_equality import as_rewritten, lora
from tests.toy_models import toy

__all__ = ["as_rewritten"]

Way = Callable[[Any, LoraConfig, Path], Any]


def saved(config: LoraConfig, folder: Path) -> Path:
    """Return the folder with an adapter of `config` for the toy model."""
    torch.manual_seed(3)
    get_peft_model(toy(), config).save_pretrained(str(folder))
    return folder


def add_adapter(model: Any, config: LoraConfig, folder: Path) -> Any:
    model = get_peft_model(model, lora(target_modules=["q_proj"]))
    model.add_adapter("late", config)
    model.set_adapter("late")
    return model


def load_adapter(model: Any, config: LoraConfig, folder: Path) -> Any:
    model = get_peft_model(model, lora(target_modules=["q_proj"]))
    model.load_adapter(saved(config, folder), "late")
    model.set_adapter("late")
    return model


def transformers_add_adapter(model: Any, config: LoraConfig, folder: Path) -> Any:
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers adds no adapter beside this PEFT: {error}")
    model.add_adapter(config)
    return model


WAYS: dict[str, Way] = {
    "get_peft_model": lambda model, config, _: get_peft_model(model, config),
    "add_adapter": add_adapter,
    "load_adapter": load_adapter,
    "from_pretrained": lambda model, config, folder: PeftModel.from_pretrained(
        model, saved(config, folder)
    ),
    "from_pretrained, low memory": lambda model, config, folder: PeftModel.from_pretrained(
        model, saved(config, folder), low_cpu_mem_usage=True
    ),
    "inject_adapter_in_model": lambda model, config, _: inject_adapter_in_model(config, model),
    "transformers' add_adapter": transformers_add_adapter,
}


def adapted(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and m.lora_A}


def weight(base: Any) -> torch.Tensor:
    return base.dequantize() if isinstance(base, QuantizedLinear) else base.weight.data


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the distance relative to the norm of `expected`."""
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dora", [False, True], ids=("LoRA", "DoRA"))
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_attached_late_is_stock_pefts(way: str, dora: bool, tmp_path: Path) -> None:
    config = lora(r=2, target_modules=["q_proj", "down_proj"], use_dora=dora)
    decoded = qlora_compile.optimize(toy(), quantize="nf4", tune="off")
    models: list[Any] = [toy(), decoded]
    with torch.no_grad():
        for name, module in decoded.named_modules():
            if isinstance(module, QuantizedLinear):
                models[0].get_submodule(name).weight.copy_(module.dequantize())
    for index, model in enumerate(models):
        torch.manual_seed(4)
        models[index] = WAYS[way](model, copy.deepcopy(config), tmp_path)
    stock, ours = map(adapted, models)
    assert stock.keys() == ours.keys()
    for name, layer in ours.items():
        expected, base = stock[name], layer.get_base_layer()
        assert isinstance(base, QuantizedLinear)
        state = {k: v for k, v in layer.state_dict().items() if "base_layer" not in k}
        expected.load_state_dict(state, strict=False)
        x = torch.randn(3, base.in_features)
        before = weight(base)
        torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=1e-5)
        for safe in (False, True):
            layer.merge(safe_merge=safe)
            expected.merge(safe_merge=safe)
            # The codes of what stock PEFT's merging makes of the weight.
            merged = copy.deepcopy(base)
            merged.requantize(weight(expected.get_base_layer()))
            assert error(weight(base), weight(merged)) < 0.02
            assert not torch.equal(weight(base), before)
            layer.unmerge()
            expected.unmerge()
            base.requantize(before)
            layer.remeasure_base()


@pytest.mark.usefixtures("as_rewritten")
def test_a_model_optimised_once_is_adapted_and_merged_again_and_again() -> None:
    model: Any = qlora_compile.optimize(toy(), quantize="int8", tune="off")
    ids = torch.arange(3, 11)[None]
    for dora in (False, True):
        model = get_peft_model(model, lora(r=2, use_dora=dora))
        adapted_logits = model(input_ids=ids, use_cache=False).logits
        model.merge_adapter()
        merged = model(input_ids=ids, use_cache=False).logits
        assert error(merged, adapted_logits) < 0.15
        model = model.merge_and_unload()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, merged)
        assert not adapted(model)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.usefixtures("as_rewritten")
def test_adapters_of_packed_experts_are_attached_late(name: str) -> None:
    model: Any = qlora_compile.optimize(experts.toy(name), quantize="int8", tune="off")
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    stock = experts.adapted(name)
    inputs = experts.batch(stock)
    for _ in range(2):
        ours = get_peft_model(model, experts.lora(name)).train()
        experts.decode_into(stock, ours)
        adapters = {n: value for n, value in ours.state_dict().items() if "lora_" in n}
        assert stock.load_state_dict(adapters, strict=False).unexpected_keys == []
        experts.assert_trains_alike(ours, stock, inputs)
        adapted_logits = experts.output(ours.eval(), inputs)
        model = ours.merge_and_unload()
        merged = experts.output(model, inputs)
        assert error(merged, adapted_logits) < 0.1


@pytest.mark.parametrize(
    "names", [["down_proj"], ["q_b_proj", "q_proj", "gate_up_proj", "down_proj"]]
)
@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "gpt_oss", "llama4_text"])
def test_names_of_packed_experts_match_what_they_match_in_stock(
    name: str, names: list[str]
) -> None:
    """PEFT takes some of these names for weights of experts, others for Linears beside these."""
    config = lora(r=2, target_modules=names)
    model: Any = qlora_compile.optimize(experts.toy(name), quantize="int8", tune="off")
    found = []
    for each in (experts.toy(name), model):
        try:
            found.append(set(adapted(get_peft_model(each, copy.deepcopy(config)))))
        except ValueError as error:
            found.append(str(error).partition(".")[0])
    assert found[0] == found[1]
