"""Layers of integers of other libraries are packed anew in place, without loss.

GPTQ's and AWQ's are stand-ins: AutoGPTQ 0.7.1, GPTQModel 5 and AutoAWQ 0.2.9 cannot be installed
here. The stand-ins have the names, the attributes and the tensors of those layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.lifecycle.initialize import (
    initialize_module_for_quantization,
)
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import qlora_compile
from qlora_compile.errors import StrictError
from qlora_compile.saving_errors import ForeignLayerError
from tests.hf.checkpoints.integer_kinds import GROUP, INTEGERS
from tests.hf.saving.test_save import assert_same
from tests.test_equality import FLOAT32_TOLERANCE, distance, lora, step, without_inductor
from tests.toy_models import tokens, toy

__all__ = ["without_inductor"]


class _StandIn(nn.Module):
    """A layer that holds the tensors of a kind, and computes with the decoded weight."""

    bias: Any

    def __init__(self, plain: nn.Linear, kind: str, **attributes: Any) -> None:
        super().__init__()
        tensors = INTEGERS[kind].encode(plain.weight.data)
        for name, tensor in tensors.items():
            self.register_buffer(name[1:], tensor)
        for name, value in attributes.items():
            setattr(self, name, value)
        bias = plain.bias
        self.register_buffer("bias", None if bias is None else bias.data)
        self._decoded = [INTEGERS[kind].decode(tensors)]

    @property
    def decoded(self) -> Tensor:
        return self._decoded[0]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.decoded.to(x.dtype), self.bias)


def _named(module: str, name: str, **methods: Any) -> Any:
    return type(name, (_StandIn,), {"__module__": module, **methods})


AutoGptqLinear = _named("auto_gptq.nn_modules.qlinear.qlinear_cuda", "QuantLinear")
GptqModelLinear = _named(
    "gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", qzero_format=lambda self: 2
)
AutoAwqLinear = _named("awq.modules.linear.gemm", "WQLinear_GEMM")


def auto_gptq(plain: nn.Linear) -> tuple[nn.Module, Tensor]:
    sizes = {"infeatures": plain.in_features, "outfeatures": plain.out_features}
    layer = AutoGptqLinear(plain, "gptq", **sizes, bits=4, group_size=GROUP)
    return layer, layer.decoded


def gptq_model(plain: nn.Linear) -> tuple[nn.Module, Tensor]:
    sizes = {"in_features": plain.in_features, "out_features": plain.out_features}
    layer = GptqModelLinear(plain, "gptq v2, act-order", **sizes, bits=4, group_size=GROUP)
    return layer, layer.decoded


def auto_awq(plain: nn.Linear) -> tuple[nn.Module, Tensor]:
    sizes = {"in_features": plain.in_features, "out_features": plain.out_features}
    layer = AutoAwqLinear(plain, "awq", **sizes, w_bit=4, group_size=GROUP)
    return layer, layer.decoded


def hqq(plain: nn.Linear) -> tuple[nn.Module, Tensor]:
    config = BaseQuantizeConfig(4, 64, axis=1)
    layer: Any = HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
    return layer, Quantizer.dequantize(
        layer.W_q.data, layer.meta | {"compute_dtype": torch.float32}
    )


def torchao(config: Any) -> Callable[[nn.Linear], tuple[nn.Module, Tensor]]:
    def quantised(plain: nn.Linear) -> tuple[nn.Module, Tensor]:
        quantize_(plain, config)
        weight: Any = plain.weight
        return plain, weight.dequantize()

    return quantised


def compressed(plain: nn.Linear) -> tuple[nn.Module, Tensor]:
    options: Any = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    args = QuantizationArgs(**options, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    layer: Any = plain
    weight = plain.weight.detach().clone()
    initialize_module_for_quantization(layer, scheme)
    shape = layer.weight_scale.shape
    layer.weight_scale.data = torch.rand(shape) * 0.02 + 0.01
    layer.weight_zero_point.data = torch.randint(-8, 8, shape).to(torch.int8)
    scales, zeros = layer.weight_scale.data, layer.weight_zero_point.data
    decoded = fake_quantize(weight, scales, zeros, args)
    compress_module(layer)
    return layer, decoded


INT4: Any = getattr(torch, "int4")  # noqa: B009  torch's stubs lack it

PLACES = {
    "self_attn.q_proj": ("gptq", auto_gptq),
    "self_attn.k_proj": ("gptq", gptq_model),
    "self_attn.v_proj": ("awq", auto_awq),
    "self_attn.o_proj": ("hqq", hqq),
    "mlp.gate_proj": ("torchao", torchao(Int8WeightOnlyConfig())),
    "mlp.up_proj": ("torchao", torchao(IntxWeightOnlyConfig(INT4, PerGroup(32)))),
    "mlp.down_proj": ("compressed-tensors", compressed),
}


def models() -> tuple[Any, Any]:
    """Return a toy Llama with the decoded values, and one of all libraries' layers."""
    dense, quantised = (toy("Llama", num_hidden_layers=1, attention_bias=True) for _ in range(2))
    torch.manual_seed(2)
    for path, (_, make) in PLACES.items():
        name = f"model.layers.0.{path}"
        layer, weight = make(quantised.get_submodule(name))
        quantised.set_submodule(name, layer)
        dense.get_submodule(name).weight.data = weight.float()
    return dense, quantised


@pytest.mark.usefixtures("without_inductor")
def test_every_library_s_layers_train_as_the_dense_weights() -> None:
    dense, quantised = models()
    torch.manual_seed(1)
    stock = get_peft_model(dense, lora(target_modules=[*PLACES]))
    torch.manual_seed(1)
    ours = qlora_compile.optimize(
        quantised, lora(target_modules=[*PLACES]), tune="model", strict=True
    )
    ids = tokens()
    found, expected = step(ours.train(), ids), step(stock.train(), ids)
    for group, error in distance(found, expected).items():
        assert error < FLOAT32_TOLERANCE, group
    sites = {
        site.name.rpartition("layers.0.")[2]: site for site in qlora_compile.explain(ours).sites
    }
    for path, (library, _) in PLACES.items():
        assert sites[path].fused
        assert sites[path].origin == f"{library} layer"


@pytest.mark.usefixtures("without_inductor")
def test_peft_s_layers_over_a_library_s_are_adopted() -> None:
    """PEFT has LoRA layers of its own for GPTQ, AWQ, HQQ and torchao, and none for Linears of
    compressed-tensors, which have no weight."""
    adapted = [path for path, (library, _) in PLACES.items() if library != "compressed-tensors"]
    config = lora(target_modules=adapted)
    own: dict[Any, Any] = dict.fromkeys((AutoGptqLinear, GptqModelLinear), GPTQLoraLinear)
    own[AutoAwqLinear] = AwqLoraLinear
    config._register_custom_module(own)
    dense, quantised = models()
    torch.manual_seed(1)
    stock = get_peft_model(dense, lora(target_modules=adapted))
    torch.manual_seed(1)
    ours = get_peft_model(quantised, config)
    kinds = {type(each).__name__ for each in ours.modules() if isinstance(each, LoraLayer)}
    assert kinds == {"GPTQLoraLinear", "AwqLoraLinear", "HqqLoraLinear", "TorchaoLoraLinear"}
    ours = qlora_compile.optimize(ours, tune="model", strict=True)
    ids = tokens()
    found, expected = step(ours.train(), ids), step(stock.train(), ids)
    for group, error in distance(found, expected).items():
        assert error < FLOAT32_TOLERANCE, group
    libraries = {"auto_gptq", "gptqmodel", "awq", "hqq"}
    assert not libraries & {type(each).__module__.partition(".")[0] for each in ours.modules()}
    report = qlora_compile.explain(ours)
    assert sum(site.fused and site.rank == 4 for site in report.sites) == 6
    ours.merge_adapter()
    ours.unmerge_adapter()


@pytest.mark.parametrize("lora_config", [None, lora(target_modules=["q_proj"])])
def test_what_was_packed_anew_is_saved_packed(tmp_path: Path, lora_config: Any) -> None:
    dense, quantised = models()
    ours = qlora_compile.optimize(quantised, lora_config, tune="model")
    base = ours if lora_config is None else ours.get_base_model()
    assert base.num_parameters() >= dense.num_parameters()
    base.save_pretrained(tmp_path)
    again = qlora_compile.load(tmp_path, dtype=torch.float32)
    state = base.state_dict()
    expected = {n.replace(".base_layer", ""): v for n, v in state.items() if "lora_" not in n}
    assert_same(again.state_dict(), expected)


def in_an_order_of_its_own(module: str, name: str, stored: str) -> Any:
    def made(plain: nn.Linear) -> nn.Module:
        sizes = {"in_features": plain.in_features, "out_features": plain.out_features}
        return _named(module, name)(plain, stored, **sizes, bits=4, group_size=GROUP)

    return made


def of_columns(plain: nn.Linear) -> nn.Module:
    config = BaseQuantizeConfig(4, 64, axis=0)
    return HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")


OBSTACLES = {
    "order of its own; load the model with the torch backend": in_an_order_of_its_own(
        "gptqmodel.nn_modules.qlinear.exllamav2", "ExllamaV2QuantLinear", "gptq"
    ),
    "load the model with the GEMM version of AutoAWQ": in_an_order_of_its_own(
        "awq.modules.linear.gemv", "WQLinear_GEMV", "awq"
    ),
    "axis is 0: .*quantise the model again with axis=1": of_columns,
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_layers_that_cannot_be_packed_are_named(reason: str, tmp_path: Path) -> None:
    model = toy("Llama", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = OBSTACLES[reason](mlp.up_proj)
    with pytest.raises(StrictError, match=f"up_proj: .*{reason}"):
        qlora_compile.optimize(model, strict=True)
    assert type(mlp.up_proj).__name__ != "QuantizedLinear"
    mlp.gate_proj = hqq(mlp.gate_proj)[0]
    qlora_compile.optimize(model)
    with pytest.raises(ForeignLayerError, match=r"up_proj is a .* could not be packed"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
