"""Weights that are trained in full, beside adapters or frozen ones, are never packed: they go on
training with stock's gradients, the report names them and one warning counts them."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qlora_compile
from bench.coverage import kinds
from qlora_compile.expert_errors import FrozenExpertsError
from qlora_compile.hf import adapters, experts
from qlora_compile.hf.full_training import TrainedInFullWarning
from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.sites import Inventory
from tests.hf.test_conv1d import gpt2
from tests.test_equality import as_rewritten
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")

TOLERANCE = 2e-5
FORMAT_NAMES = [each.name for each in FORMATS]


def model_of(kind: str) -> Any:
    """Return a model of one layer: what is trained differs between layers, and so would their
    graphs."""
    if kind == "linear":
        return toy("Llama", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    model = gpt2() if kind == "conv1d" else kinds.built(kinds.KINDS[kind])
    body = model.base_model
    for layers in (layers for layers in body.children() if isinstance(layers, nn.ModuleList)):
        del layers[1:]
    return model


def inputs_of(kind: str, model: Any) -> dict[str, Tensor]:
    if kind in ("linear", "conv1d"):
        ids = tokens(2, 9)
        return {"input_ids": ids, "labels": ids}
    return kinds.batch(adapters.base_model(model))


TARGETS = {"linear": ["q_proj", "up_proj"], "conv1d": ["c_attn"], "gpt_oss": ["q_proj"]}
KINDS = ("linear", "conv1d", "gpt_oss")


def lora(kind: str, **options: Any) -> LoraConfig:
    defaults = {
        "r": 2,
        "target_modules": TARGETS[kind],
        "init_lora_weights": False,
        "fan_in_fan_out": kind == "conv1d",
    }
    return LoraConfig(**(defaults | options))


def decode_into(stock: nn.Module, ours: nn.Module) -> None:
    """Give `stock` the weights that `ours` decodes."""
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            target, weight = stock.get_submodule(name), module.dequantize()
            target.weight.data = weight.t().contiguous() if isinstance(target, Conv1D) else weight
        elif isinstance(module, PackedExperts):
            stock.get_parameter(name.removesuffix("_packed")).data = module.parameter().data


def assert_trains_alike(ours: Any, stock: Any, inputs: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    actual, expected = gradients(ours, inputs), gradients(stock, inputs)
    assert actual.keys() == expected.keys()
    # A gradient that is zero but for rounding, as that of a key's bias, tells nothing.
    least = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp_min(least)
        assert error <= TOLERANCE, name


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def optimized(model: Any, kept: dict[str, Tensor], **options: Any) -> Any:
    """Return the model, after one warning that counts the `kept` weights, if there are any."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = qlora_compile.optimize(model, tune="model", **options)
    told = [str(each.message) for each in caught if each.category is TrainedInFullWarning]
    assert len(told) == bool(kept)
    size = sum(weight.nbytes for weight in kept.values())
    assert not told or told[0].startswith(f"{len(kept)} weights ({size:,} bytes) stay unq")
    return model


def kept_by_quantize(model: Any) -> dict[str, Tensor]:
    """Return sites that could be packed but for what is trained, and their weights."""
    base: Any = adapters.base_model(model)
    head = base.get_output_embeddings()
    kept: dict[str, Any] = {
        name: entry.weight
        for name, entry in Inventory(model).linears.items()
        if entry.module is not head and entry.weight.requires_grad
    }
    for name, site in Inventory(model).experts.items():
        if any(parameter.requires_grad for parameter in site.module.parameters()):
            kept[name] = getattr(site.module, site.parameter)
    return kept


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=3)
def test_what_is_thawed_trains_as_in_stock(kind: str, data: st.DataObject) -> None:
    model = model_of(kind)
    if data.draw(st.booleans(), label="adapters"):
        model = get_peft_model(model, lora(kind))
    else:
        model.requires_grad_(False)
    names = st.sampled_from([n for n, p in model.named_parameters() if not p.requires_grad])
    for name in data.draw(st.lists(names, min_size=1, max_size=6, unique=True), label="before"):
        model.get_parameter(name).requires_grad_(True)
    stock, left = copy.deepcopy(model).train(), kept_by_quantize(model)
    format = data.draw(st.sampled_from(FORMAT_NAMES), label="format")
    ours = optimized(model, left, quantize=format).train()
    assert trainable(ours) == trainable(stock)
    decode_into(stock, ours)
    inputs = inputs_of(kind, ours)
    assert_trains_alike(ours, stock, inputs)
    reasons = {site.name: str(site.reason) for site in qlora_compile.explain(ours).sites}
    for name, weight in left.items():
        told = "it is trained in full" if weight.requires_grad else "another parameter of its"
        assert reasons[name].startswith(told), name
    # What is packed has become another parameter, and what the experts' op computes stays frozen.
    fixed = tuple(n for n, m in ours.named_modules() if experts.is_served(m))
    floating = {n for n, p in ours.named_parameters() if p.is_floating_point()}
    late = data.draw(st.lists(names, max_size=3, unique=True), label="after")
    late = [n for n in late if n in floating and not (fixed and n.startswith(fixed))]
    for name in late:
        ours.get_parameter(name).requires_grad_(True)
        stock.get_parameter(name).requires_grad_(True)
    if late:
        assert_trains_alike(ours, stock, inputs)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=2)
def test_where_adapters_are_attached_peft_decides(kind: str, data: st.DataObject) -> None:
    """Whatever was trained or frozen before: what stock PEFT trains is trained, nothing else."""
    model = model_of(kind)
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    leaves = sorted({name.rpartition(".")[2] for name in Inventory(model).linears})
    # PEFT compares endings: "proj" is all whose name ends so.
    saved = data.draw(st.sampled_from([None, *leaves, *(leaf[-4:] for leaf in leaves)]))
    bias = data.draw(st.sampled_from(["none", "all", "lora_only"]))
    config = lora(kind, modules_to_save=saved and [saved], bias=bias)
    try:
        stock = get_peft_model(copy.deepcopy(model), config).train()
    except (TypeError, ValueError) as refused:
        with pytest.raises(type(refused), match=re.escape(str(refused))):
            optimized(model, {}, lora=config, quantize="nf4")
        return
    ours = optimized(model, {}, lora=config, quantize="nf4").train()
    assert trainable(ours) == trainable(stock)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours.get_parameter(name))
    decode_into(stock, ours)
    assert_trains_alike(ours, stock, inputs_of(kind, ours))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_as_loaded_is_packed_whole(kind: str) -> None:
    ours = optimized(model_of(kind), {}, quantize="nf4").train()
    head = ours.get_output_embeddings()
    linears = [e.module for e in Inventory(ours).linears.values() if e.module is not head]
    assert all(isinstance(linear, QuantizedLinear) for linear in linears)
    assert all(isinstance(s.weight, PackedExperts) for s in Inventory(ours).experts.values())
    stock = model_of(kind).train()
    decode_into(stock, ours)
    for name in trainable(stock) - trainable(ours):
        stock.get_parameter(name).requires_grad_(False)
    assert_trains_alike(ours, stock, inputs_of(kind, ours))


def test_an_experts_bias_that_begins_to_train_is_refused() -> None:
    ours = optimized(model_of("gpt_oss").requires_grad_(False), {}, quantize="nf4").train()
    inputs = inputs_of("gpt_oss", ours)
    site = next(iter(Inventory(ours).experts.values()))
    getattr(site.module, f"{site.parameter}_bias").requires_grad_(True)
    with pytest.raises(Exception, match="was frozen when optimize") as caught:
        ours(**inputs)
    errors = [caught.value, caught.value.__cause__]
    assert any(isinstance(e, FrozenExpertsError) or "FrozenExperts" in str(e) for e in errors)
