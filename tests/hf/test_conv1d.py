"""Conv1D, whose weight is stored transposed: fused, packed, merged and saved as a Linear is."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qlora_compile
from bench.agreement import Errors, distance, training_step
from qlora_compile.hf.conv1d import as_linear, features
from qlora_compile.kernels.registry import FORMATS, VARIANTS
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.sites import Inventory
from tests.test_equality import (
    BF16_FACTOR,
    FLOAT32_TOLERANCE,
    SHAPES,
    lora,
    step,
    without_inductor,
)
from tests.toy_models import VOCABULARY, tokens

__all__ = ["without_inductor"]

TARGETS = ["c_attn", "c_fc", "c_proj"]


def gpt2(model_class: str = "GPT2LMHeadModel") -> Any:
    torch.manual_seed(0)
    config_class = model_class.replace("LMHeadModel", "Config")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**sizes, **still)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model


def adapted(model: Any, optimized: bool) -> Any:
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(model, lora(target_modules=TARGETS))
    return qlora_compile.optimize(model) if optimized else model


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert max(distance(actual, expected).values()) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("model_class", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("without_inductor")
def test_every_conv1d_is_fused_and_equal(model_class: str, autocast: bool) -> None:
    stock, ours = (adapted(gpt2(model_class), optimized) for optimized in (False, True))
    errors = Errors()
    for shape in SHAPES[: 6 if autocast else 2]:
        ids = tokens(*shape)
        actual, expected = (step(model, ids, autocast) for model in (ours, stock))
        if autocast:
            errors.add(actual, expected, step(stock, ids))
        else:
            assert_close(actual, expected)
    for group, (mine, theirs) in errors.by_group().items():
        assert group == "loss" or mine <= BF16_FACTOR * theirs, group
    report = qlora_compile.explain(ours)
    assert [site.fused for site in report.sites] == [True] * 8 + [False]
    assert {(site.n, site.k) for site in report.sites} == {
        *((96, 32), (32, 32), (128, 32), (32, 128)),
        (VOCABULARY, 32),
    }


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    ("format", "declared"),
    list(zip((each.name for each in FORMATS), itertools.cycle((False, True)), strict=False)),
)
def test_packed_conv1d_trains_merges_and_saves_as_stock(
    format: str, declared: bool, tmp_path: Path
) -> None:
    """declared: the user's config says fan_in_fan_out, as PEFT's documentation tells to."""
    config = lora(target_modules=TARGETS, fan_in_fan_out=declared)
    torch.manual_seed(1)
    ours = qlora_compile.optimize(gpt2(), config, quantize=format)
    packed = {n: m for n, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 8
    torch.manual_seed(1)
    stock = get_peft_model(gpt2(), lora(target_modules=TARGETS, fan_in_fan_out=True))
    for name, module in packed.items():
        stock.get_submodule(name).weight.data = module.dequantize().t().contiguous()
    ids = tokens(2, 9)
    assert_close(training_step(ours, ids), training_step(stock, ids))
    assert qlora_compile.explain(ours).fused == 8

    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path)
    for name, value in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(value, stock.get_parameter(name))

    name = next(iter(packed)).removesuffix(".base_layer")
    weight = packed[f"{name}.base_layer"].dequantize()
    layer, stock_layer = (cast("Any", model.get_submodule(name)) for model in (ours, stock))
    expected = copy.deepcopy(packed[f"{name}.base_layer"])
    expected.requantize(weight + stock_layer.get_delta_weight("default").t())
    layer.merge()
    assert torch.equal(layer.get_base_layer().weight, expected.weight)


@pytest.mark.usefixtures("without_inductor")
def test_plain_merge_and_unmerge_as_stock() -> None:
    stock, ours = (adapted(gpt2(), optimized) for optimized in (False, True))
    ids = tokens(2, 9)
    for change in ("merge_adapter", "unmerge_adapter"):
        with torch.no_grad():
            for model in (stock, ours):
                getattr(model, change)()
            torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.first, self.second = Conv1D(k, k), Conv1D(n, k)
        for conv in (self.first, self.second):
            nn.init.normal_(conv.bias)
            conv.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_inductor_hands_on_the_stored_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qlora_compile.optimize(Model(16, 8), tune="model")
    seen: set[int] = set()
    for variant in {type(variant) for variant in VARIANTS}:
        for direction in ("forward_group", "backward_group"):
            watch(monkeypatch, variant, direction, seen)
    model(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert seen == {model.first.weight.data_ptr(), model.second.weight.data_ptr()}


def watch(patch: pytest.MonkeyPatch, variant: type, direction: str, seen: set[int]) -> None:
    """Put the addresses of the weights that `variant` is given into `seen`."""
    real = getattr(variant, direction)

    def watching(self: Any, *arguments: Any) -> Any:
        group = arguments[direction == "backward_group"]
        seen.update(tensors.planes[0].data_ptr() for tensors, _ in group)
        return real(self, *arguments)

    patch.setattr(variant, direction, watching)


@pytest.mark.usefixtures("without_inductor")
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    rows=st.lists(st.integers(1, 5), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=12)
def test_any_leading_dimensions(n: int, k: int, rows: list[int], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = Model(n, k).to(dtype)
    inputs = [torch.randn(*rows, k, dtype=dtype, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    ours = qlora_compile.optimize(copy.deepcopy(model), tune="model")
    reference = model.double()(inputs[0].double())
    actual = ours(inputs[1])
    grad = torch.randn_like(reference)
    reference.backward(grad)
    actual.backward(grad.to(dtype))
    torch.testing.assert_close(actual, reference.to(dtype))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert qlora_compile.explain(ours).fused == 2


def test_a_conv1d_seen_as_a_linear_shares_its_weight() -> None:
    conv = Conv1D(5, 3)
    linear = as_linear(conv)
    x = torch.randn(4, 3)
    torch.testing.assert_close(linear(x), conv(x))
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    assert features(conv) == features(linear) == (5, 3)
    assert list(Inventory(Model(5, 3)).linears) == ["first", "second"]
