"""bitsandbytes' layers are adopted in place, or reported with the obstacle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from torch import nn

import qlora_compile
from bench.agreement import distance
from qlora_compile.errors import StrictError
from qlora_compile.hf.bases.bitsandbytes_layers import AdoptedLinear4bit, AdoptedLinear8bitLt
from tests.test_equality import FLOAT32_TOLERANCE, lora, step, without_inductor
from tests.toy_models import tokens, toy, with_bitsandbytes

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_adopted_without_a_copy(bits: int) -> None:
    model = get_peft_model(with_bitsandbytes(toy(), bits), lora())
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    step(qlora_compile.optimize(model).train(), tokens())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights
    assert list(model.state_dict()) == keys
    # transformers saves such models right.
    assert "save_pretrained" not in vars(model.get_base_model())


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_are_attached_to_a_bitsandbytes_model(bits: int) -> None:
    models: list[Any] = [with_bitsandbytes(toy(), bits) for _ in range(2)]
    torch.manual_seed(1)
    stock = get_peft_model(models[0], lora())
    torch.manual_seed(1)
    ours = qlora_compile.optimize(models[1], lora())
    ids = tokens()
    for group, error in distance(step(ours.train(), ids), step(stock.train(), ids)).items():
        assert error < FLOAT32_TOLERANCE, group
    assert qlora_compile.explain(ours).fused == 14


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_merged_and_unmerged_between_calls(bits: int) -> None:
    models: list[Any] = []
    for optimized in (False, True):
        torch.manual_seed(1)
        model: Any = get_peft_model(with_bitsandbytes(toy(), bits), lora())
        models.append(qlora_compile.optimize(model) if optimized else model)
    ids = tokens()
    for change in ("train", "merge_adapter", "unmerge_adapter"):
        for model in models:
            getattr(model.base_model if "merge" in change else model, change)()
        stock, ours = (model(input_ids=ids, labels=ids).logits for model in models)
        assert float((ours - stock).norm() / stock.norm()) < FLOAT32_TOLERANCE, change
        assert qlora_compile.explain(models[1]).fused == 14


def test_what_bitsandbytes_keeps_is_named() -> None:
    model: Any = get_peft_model(with_bitsandbytes(toy(), 8), lora())
    mlp = model.base_model.model.model.layers[1].mlp
    mlp.up_proj.base_layer = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=True)
    with pytest.raises(StrictError, match=r"layers\.1\.mlp\.up_proj: .* in 16 bits"):
        qlora_compile.optimize(model, strict=True)
    report = qlora_compile.explain(qlora_compile.optimize(model))
    left = {site.name.removeprefix("base_model.model."): site.reason for site in report.sites}
    assert "in 16 bits" in (left["model.layers.1.mlp.up_proj"] or "")
    # That layer's own code breaks the graph of its block, and of no other.
    assert all(site.fused or site.reason for site in report.sites)
    assert all(site.fused for site in report.sites if ".layers.0." in site.name)


def _without_double_quantisation(linear: nn.Linear) -> nn.Module:
    layer: Any = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, False, None, compress_statistics=False
    )
    parameter: Any = bnb.nn.Params4bit
    layer.weight = parameter(
        linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="fp4"
    )
    return layer.to("cpu")


def test_fp4_without_double_quantisation_is_adopted() -> None:
    models: list[Any] = []
    for _ in range(2):
        model: Any = toy()
        for block in model.model.layers:
            block.mlp.up_proj = _without_double_quantisation(block.mlp.up_proj)
        torch.manual_seed(1)
        models.append(get_peft_model(model, lora()).train())
    stock, ours = models[0], qlora_compile.optimize(models[1])
    ids = tokens()
    for group, error in distance(step(ours, ids), step(stock, ids)).items():
        assert error < FLOAT32_TOLERANCE, group
    report = qlora_compile.explain(ours)
    assert {s.format for s in report.sites if s.fused and "up_proj" in s.name} == {"fp4"}


def _in_16_bits(layer: Any) -> Any:
    return bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=True)


def _unquantised(bits: int) -> Callable[[Any], Any]:
    def make(layer: Any) -> Any:
        if bits == 8:
            return bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
        return bnb.nn.Linear4bit(64, 128, bias=False)

    return make


def _repacked(layer: Any) -> Any:
    layer.weight.quant_state.packing_format_for_cpu = True
    return layer


def _other_storage(layer: Any) -> Any:
    layer.weight.data = layer.weight.data.view(-1).view(torch.bfloat16)
    return layer


def _other_nested_blocks(layer: Any) -> Any:
    layer.weight.quant_state.state2.blocksize = 128
    return layer


@pytest.mark.parametrize(
    ("bits", "change", "reason"),
    [
        (8, _in_16_bits, "keeps its weight in 16 bits"),
        (8, _unquantised(8), "has not quantised its weight yet"),
        (4, _unquantised(4), "has not quantised its weight yet"),
        (4, _repacked, "optimise before evaluating"),
        (4, _other_storage, "stored as torch.bfloat16"),
        (4, _other_nested_blocks, "nested block size is 128, not 256"),
    ],
)
def test_what_cannot_be_adopted_is_named(
    bits: int, change: Callable[[Any], Any], reason: str
) -> None:
    model: Any = with_bitsandbytes(toy(), bits)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = change(mlp.up_proj)
    kind = type(mlp.up_proj)
    with pytest.raises(StrictError, match=rf"layers\.1\.mlp\.up_proj: .*{reason}"):
        qlora_compile.optimize(model, strict=True)
    qlora_compile.optimize(model)
    assert type(mlp.up_proj) is kind
    assert isinstance(mlp.gate_proj, AdoptedLinear4bit | AdoptedLinear8bitLt)


def test_evaluation_does_not_repack_an_adopted_weight() -> None:
    """On AVX-512 BF16 CPUs bitsandbytes would, in place, when a layer is evaluated."""
    model = with_bitsandbytes(toy(), 4)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    qlora_compile.optimize(model).eval()
    before = [layer.weight.clone() for layer in layers]
    with torch.no_grad():
        model(input_ids=tokens())
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.quant_state.nested


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.usefixtures("without_inductor")
def test_stock_calls_leave_biases_as_they_are(
    bits: int, dtype: torch.dtype, autocast: bool
) -> None:
    """bitsandbytes' own forward casts a bias in place, to what inference mode lets nobody train."""
    model = with_bitsandbytes(toy(attention_bias=True), bits)
    model = qlora_compile.optimize(model, lora(), tune="off").to(dtype)
    ids = tokens()
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    before = {name: bias.clone() for name, bias in biases.items()}
    expected = model.train()(**batch).loss
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**batch)
    for name, bias in biases.items():
        assert not bias.is_inference(), name
        assert torch.equal(bias, before[name]), name
    loss = model.train()(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
