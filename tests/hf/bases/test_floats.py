"""Layers of floats of transformers, torchao and compressed-tensors are packed anew without loss,
and train as stock PEFT trains the weights that the library's own decoder makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import (
    FP8Experts,
    FP8Linear,
    replace_with_fp8_linear,
)

import qlora_compile
from bench.coverage import kinds
from qlora_compile.errors import AlreadyQuantizedError
from qlora_compile.hf.saving.base_tensors import is_packed
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from tests.hf.checkpoints.integer_kinds import INTEGERS
from tests.hf.checkpoints.written import KINDS, fp8_decoded, fp8_tensors, written
from tests.hf.saving.test_save import assert_same
from tests.hf.test_experts import assert_trains_alike
from tests.hf.test_experts import lora as lora_of_experts
from tests.test_equality import FLOAT32_TOLERANCE, distance, lora, step, without_inductor
from tests.toy_models import tokens, toy

__all__ = ["without_inductor"]

Decoded = dict[str, Tensor]
"""What the library's own decoder makes of each Linear."""


def linears(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def llama() -> Any:
    return toy(intermediate_size=256, num_hidden_layers=1, attention_bias=True)


def of_transformers(folder: Path) -> tuple[Any, Decoded]:
    model, decoded = llama(), {}
    for name, linear in linears(model).items():
        biased = linear.bias is not None
        shape = (linear.in_features, linear.out_features)
        layer: Any = FP8Linear(*shape, block_size=(128, 128), has_bias=biased)
        parts = fp8_tensors(linear.weight.detach())
        layer.weight.data = parts[".weight"]
        layer.weight_scale_inv.data = parts[".weight_scale_inv"]
        layer.bias = linear.bias
        decoded[name] = fp8_decoded(parts)
        model.set_submodule(name, layer)
    return model, decoded


def of_float8(folder: Path) -> tuple[Any, Decoded]:
    model = llama()
    quantize_(model, Float8WeightOnlyConfig(), lambda module, name: name in linears(model))
    return model, {name: each.weight.dequantize() for name, each in linears(model).items()}


def of_nf4(folder: Path) -> tuple[Any, Decoded]:
    model = llama()
    for linear in linears(model).values():
        linear.weight = nn.Parameter(to_nf4(linear.weight.detach(), 64, 32), requires_grad=False)
    weights = {name: each.weight.get_original_weight() for name, each in linears(model).items()}
    return model, weights


def of_compressed_tensors(kind: str) -> Callable[[Path], tuple[Any, Decoded]]:
    def make(folder: Path) -> tuple[Any, Decoded]:
        dense = written(folder, llama(), KINDS[kind])
        model = LlamaForCausalLM.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(dequantize=False)
        )
        return model, {name: each.weight.data for name, each in linears(dense).items()}

    return make


LIBRARIES: dict[str, Callable[[Path], tuple[Any, Decoded]]] = {
    "transformers FP8": of_transformers,
    "torchao Float8Tensor": of_float8,
    "torchao NF4Tensor": of_nf4,
    **{
        f"compressed-tensors {name}": of_compressed_tensors(name)
        for name, kind in KINDS.items()
        if kind.method == "compressed-tensors" and name not in INTEGERS
    },
}

DIFFERENCE = {"torchao NF4Tensor": 5e-5, "compressed-tensors nvfp4-pack-quantized": 3e-7}
"""Relative to a row's largest value: torchao writes four digits of the sixteen values; a product
with a reciprocal in place of a division. All others are equal bit for bit."""


@pytest.mark.parametrize("name", LIBRARIES)
def test_packed_anew(tmp_path: Path, name: str) -> None:
    model, decoded = LIBRARIES[name](tmp_path)
    with pytest.raises(AlreadyQuantizedError):
        qlora_compile.optimize(model, lora(), quantize="nf4")
    ours = qlora_compile.optimize(model, lora(), tune="model")
    for path, weight in decoded.items():
        packed = ours.get_base_model().get_submodule(path).base_layer
        assert isinstance(packed, QuantizedLinear)
        actual = packed.dequantize(torch.float32)
        scale = weight.abs().amax(1, keepdim=True)
        assert ((actual - weight).abs() <= DIFFERENCE.get(name, 0.0) * scale).all(), path
        assert name.startswith(packed.origin.removesuffix(" layer"))


@pytest.mark.parametrize("name", LIBRARIES)
def test_packed_anew_it_is_saved_packed(tmp_path: Path, name: str) -> None:
    model, decoded = LIBRARIES[name](tmp_path / "theirs")
    count = llama().num_parameters()
    ours = qlora_compile.optimize(model, tune="model")
    assert ours.num_parameters() == count
    ours.save_pretrained(tmp_path / "ours")
    again = qlora_compile.load(tmp_path / "ours", dtype=torch.float32)
    assert set(decoded) <= {path for path, module in again.named_modules() if is_packed(module)}
    assert_same(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize("name", ["compressed-tensors nvfp4-pack-quantized", "torchao NF4Tensor"])
@pytest.mark.usefixtures("without_inductor")
def test_trains_as_over_the_decoded_weight(tmp_path: Path, name: str) -> None:
    model, decoded = LIBRARIES[name](tmp_path)
    torch.manual_seed(1)
    ours = qlora_compile.optimize(model, lora(), tune="model").train()
    stock = llama()
    for path in decoded:
        packed = ours.get_base_model().get_submodule(path).base_layer
        stock.get_submodule(path).weight.data = packed.dequantize(torch.float32)
    torch.manual_seed(1)
    twin = get_peft_model(stock, lora()).train()
    ids = tokens()
    for group, error in distance(step(ours, ids), step(twin, ids)).items():
        assert error < FLOAT32_TOLERANCE, group
    fused = [site for site in qlora_compile.explain(ours).sites if site.fused]
    assert len(fused) == len(decoded)
    assert all(name.startswith((site.origin or "?").removesuffix(" layer")) for site in fused)


def test_adapters_attached_before_stay(tmp_path: Path) -> None:
    model, _ = of_transformers(tmp_path)
    adapted = get_peft_model(model, lora())
    kept = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" in n}
    ours = qlora_compile.optimize(copy.deepcopy(adapted), tune="model")
    for name, parameter in ours.named_parameters():
        assert name not in kept or torch.equal(parameter, kept[name])
    layer = ours.get_base_model().model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "QuantizedLoraLinear"


def with_fp8_experts(dense: Any) -> Any:
    """Return a copy of a mixture with transformers' FP8Experts; give `dense` the decoded values."""
    model = copy.deepcopy(dense)
    config = FineGrainedFP8Config()
    others = [name for name, _ in model.named_modules() if name and not name.endswith("experts")]
    kept = [name for name in others if not any(m.startswith(name + ".") for m in others)]
    replace_with_fp8_linear(model, modules_to_not_convert=kept, quantization_config=config)
    for name, module in model.named_modules():
        if not isinstance(module, FP8Experts):
            continue
        for parameter in ("gate_up_proj", "down_proj"):
            weight = dense.get_parameter(f"{name}.{parameter}").data
            rows = getattr(module, f"{parameter}_scale_inv").shape[1]
            experts, n, k = weight.shape
            runs = weight.view(experts, rows, n // rows, k)
            scales = runs.abs().amax((2, 3), keepdim=True) / 448.0
            codes = (runs / scales).to(torch.float8_e4m3fn)
            weight.copy_((codes.float() * scales).view_as(weight))
            frozen = {"requires_grad": False}
            setattr(module, parameter, nn.Parameter(codes.view_as(weight), **frozen))
            stored = nn.Parameter(scales.view(experts, rows, 1), **frozen)
            setattr(module, f"{parameter}_scale_inv", stored)
    return model


def test_experts_of_transformers_are_saved_packed(tmp_path: Path) -> None:
    model = qlora_compile.optimize(with_fp8_experts(kinds.built(kinds.KINDS["mixtral"])))
    model.save_pretrained(tmp_path)
    again = qlora_compile.load(tmp_path, dtype=torch.float32)
    assert sum(isinstance(module, PackedExperts) for module in again.modules()) >= 4
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.usefixtures("without_inductor")
def test_experts_of_transformers_train_as_the_dense_ones() -> None:
    dense = kinds.built(kinds.KINDS["mixtral"])
    model = with_fp8_experts(dense)
    torch.manual_seed(1)
    ours = qlora_compile.optimize(model, lora_of_experts("mixtral"), tune="model").float().train()
    torch.manual_seed(1)
    stock = get_peft_model(dense, lora_of_experts("mixtral")).train()
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lora_" in name:  # which PEFT has rounded to the bfloat16 of packed experts
            parameter.data.copy_(expected[name].data)
    assert_trains_alike(ours, stock, kinds.batch(dense))
    weights = [site for site in qlora_compile.explain(ours).sites if site.experts]
    assert len(weights) >= 2
    assert {(w.fused, w.format, w.origin) for w in weights} == {
        (True, "fp8_e4m3", "transformers FP8 layer")
    }
