"""Optimised mixtures of experts train, merge and save like stock PEFT's, by our op."""

from __future__ import annotations

import copy
import itertools
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import nn
from torch._dynamo.utils import counters

import qlora_compile
from bench.coverage import kinds
from bench.coverage.compare import largest, trained
from qlora_compile.errors import StrictError, WeightValueError
from qlora_compile.expert_errors import FrozenExpertsError
from qlora_compile.kernels.registry import FORMATS
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.sites import Inventory
from tests.test_equality import as_rewritten, without_inductor

__all__ = ["as_rewritten", "without_inductor"]

# Two orders of float32 sums: 2.02e-5 apart with AVX2, less with AVX-512.
TOLERANCE = 3e-5

TYPES = {
    "mixtral": ("gate_up_proj", "down_proj"),
    "qwen3_moe": ("gate_up_proj", "down_proj"),
    "olmoe": ("gate_up_proj", "down_proj"),
    "deepseek_v3": ("gate_up_proj", "down_proj"),
    "gpt_oss": ("gate_up_proj", "down_proj"),
    "llama4_text": ("gate_up_proj", "down_proj"),
    "nemotron_h": ("up_proj", "down_proj"),
}
"""By model type, the weights of its experts."""


def lora(name: str = "mixtral", **options: Any) -> LoraConfig:
    parameters = [f"experts.{weight}" for weight in TYPES[name]]
    defaults = {
        "r": 4,
        "target_modules": ["q_b_proj"] if name == "deepseek_v3" else ["q_proj", "v_proj"],
        "target_parameters": parameters,
        "init_lora_weights": False,
    }
    return LoraConfig(**(defaults | options))


def toy(name: str = "mixtral") -> Any:
    return kinds.built(kinds.KINDS[name])


def batch(model: Any) -> dict[str, torch.Tensor]:
    return kinds.batch(model.get_base_model() if isinstance(model, PeftModel) else model)


def adapted(name: str = "mixtral", **options: Any) -> Any:
    model = toy(name)
    torch.manual_seed(1)
    return get_peft_model(model, lora(name, **options)).train()


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((actual - expected).norm()) <= TOLERANCE * float(expected.norm())


def assert_trains_alike(ours: Any, stock: Any, inputs: dict[str, torch.Tensor]) -> None:
    actual, expected = trained(ours, inputs), trained(stock, inputs)
    assert actual[0].keys() == expected[0].keys()
    assert sum("experts" in name for name in expected[0]) >= 4
    assert max(largest(actual, expected).values()) <= TOLERANCE


def decode_into(stock: nn.Module, ours: nn.Module) -> None:
    """Give `stock` the weights that `ours` decodes."""
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            stock.get_submodule(name).weight.data = module.dequantize()
        elif isinstance(module, PackedExperts):
            stock.get_parameter(name.removesuffix("_packed")).data = module.parameter().data


def quantized(format: Any, name: str = "mixtral", **options: Any) -> tuple[Any, Any]:
    """Return the optimised model with packed experts, and stock PEFT's with the weights it
    decodes."""
    model = toy(name)
    torch.manual_seed(1)
    ours = qlora_compile.optimize(
        model, lora(name), quantize=format, tune="model", **options
    ).train()
    stock = adapted(name)
    decode_into(stock, ours)
    return ours, stock


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.usefixtures("without_inductor")
def test_trains_as_stock_without_graph_break(name: str) -> None:
    stock = adapted(name)
    ours = qlora_compile.optimize(copy.deepcopy(stock), tune="model")
    counters.clear()
    assert_trains_alike(ours, stock, batch(stock))
    assert not counters["graph_break"]
    report = qlora_compile.explain(ours)
    weights = [site for site in report.sites if site.experts]
    assert all(site.fused and site.rank == 4 for site in weights), str(report)
    assert {site.name.rpartition(".")[2] for site in weights} == set(TYPES[name])
    count = sum(p.numel() for n, p in toy(name).named_parameters() if n.endswith(TYPES[name]))
    stored = sum(site.parameters for site in weights)
    assert stored <= count
    assert f"{len(weights)} of {len(weights)} weights of experts fused, {stored:,}" in str(report)


@pytest.mark.parametrize(
    ("format", "name"),
    list(
        zip(
            (each.name for each in FORMATS),
            itertools.cycle(("mixtral", "gpt_oss", "llama4_text", "deepseek_v3")),
            strict=False,
        )
    ),
)
@pytest.mark.usefixtures("without_inductor")
def test_quantized_experts_train_as_stock(format: str, name: str) -> None:
    ours, stock = quantized(format, name)
    assert_trains_alike(ours, stock, batch(stock))
    weights = [site for site in qlora_compile.explain(ours).sites if site.experts]
    assert {(site.fused, site.format) for site in weights} == {(True, format)}
    packed = [n.split(".") for n, _ in ours.named_parameters() if "packed_layout" in n]
    assert packed
    assert not [parts for parts in packed if "router" in parts]


def test_trains_as_stock_with_inductor_and_checkpointing() -> None:
    ours, stock = quantized("nf4", "qwen3_moe")
    for model in (ours, stock):
        model.gradient_checkpointing_enable()
    assert_trains_alike(ours, stock, batch(stock))


@pytest.mark.usefixtures("without_inductor")
def test_all_linear_adapts_routers_without_graph_break() -> None:
    torch.manual_seed(1)
    options = {"target_modules": "all-linear", "target_parameters": None}
    stock = adapted("mixtral", **options)
    wrapped = [m.parameter_name for m in stock.modules() if isinstance(m, PeftParamWrapper)]
    assert set(wrapped) == {"weight", "gate_up_proj", "down_proj"}
    ours = qlora_compile.optimize(copy.deepcopy(stock), tune="model")
    counters.clear()
    assert_trains_alike(ours, stock, batch(stock))
    # Dynamo of torch 2.11 does not trace the `is` in PEFT's wrapper.
    assert bool(counters["graph_break"]) == (version("torch") < "2.12")


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": []}, {"target_modules": ["w1", "w2", "w3"], "target_parameters": None}],
)
@pytest.mark.usefixtures("without_inductor")
def test_adapters_on_experts_alone(targets: dict[str, Any]) -> None:
    """By their parameters, and by the names of their Linears before transformers 5."""
    stock = adapted("mixtral", **targets)
    model = toy("mixtral")
    torch.manual_seed(1)
    ours = qlora_compile.optimize(model, lora("mixtral", **targets), tune="model").train()
    assert_trains_alike(ours, stock, batch(stock))
    fused = {site.name for site in qlora_compile.explain(ours).sites if site.fused and site.rank}
    assert fused
    assert all(name.rpartition(".")[2] in TYPES["mixtral"] for name in fused)


@pytest.mark.usefixtures("without_inductor")
def test_bfloat16_is_no_farther_from_float32_than_stock() -> None:
    exact = adapted()
    # The same weights, rounded once.
    exact.to(torch.bfloat16).float()
    stock = copy.deepcopy(exact).to(torch.bfloat16)
    ours = qlora_compile.optimize(copy.deepcopy(stock), tune="model")
    inputs = batch(stock)
    expected = trained(exact, inputs)[:1]
    errors, allowed = (largest(trained(m, inputs)[:1], expected) for m in (ours, stock))
    for group, error in errors.items():
        assert error <= 1.5 * allowed[group] + 4e-3, group


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize("format", [None, "nf4"])
def test_adapter_switches_agree_with_stock(format: str | None) -> None:
    if format is None:
        stock = adapted()
        ours = qlora_compile.optimize(copy.deepcopy(stock), tune="model")
    else:
        ours, stock = quantized(format)
    inputs = batch(stock)
    for model in (ours, stock):
        torch.manual_seed(2)
        model.add_adapter("second", lora(r=2, lora_alpha=16))
    for active in ("default", "second", ["default", "second"]):
        for model in (ours, stock):
            model.base_model.set_adapter(active)
        assert_trains_alike(ours, stock, inputs)
    with ours.disable_adapter(), stock.disable_adapter():
        assert_close(output(ours, inputs), output(stock, inputs))
    ranks = {site.rank for site in qlora_compile.explain(ours).sites if site.experts}
    assert ranks == {6}


@pytest.mark.usefixtures("as_rewritten")
def test_saved_adapters_are_stock_peft_files(tmp_path: Path) -> None:
    ours, stock = quantized("nf4")
    inputs = batch(stock)
    trained(ours, inputs)
    ours.save_pretrained(str(tmp_path))
    plain = toy()
    loaded: Any = PeftModel.from_pretrained(plain, str(tmp_path))
    decode_into(loaded, ours)
    assert_close(output(loaded, inputs), output(ours.eval(), inputs))
    # And back again: stock PEFT's file into an optimised model.
    again, _ = quantized("nf4")
    again.load_adapter(str(tmp_path), "default")
    assert_close(output(again.eval(), inputs), output(ours, inputs))


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("format", [None, "int8"])
def test_merge_and_unmerge(format: str | None, name: str) -> None:
    if format is None:
        stock = adapted(name)
        ours = qlora_compile.optimize(copy.deepcopy(stock), tune="model")
    else:
        ours, stock = quantized(format, name, block_size=32)
    for model in (ours, stock):
        model.eval()
    inputs = batch(stock)
    before = output(ours, inputs)
    ours.merge_adapter()
    stock.merge_adapter()
    merged, expected = output(ours, inputs), output(stock, inputs)
    if format is None:
        assert_close(merged, expected)
    else:
        # Merging rounds to the format again.
        assert float((merged - expected).norm()) <= 0.05 * float(expected.norm())
        decode_into(stock.get_base_model(), ours.get_base_model())
        assert_close(merged, output(stock, inputs))
    ours.unmerge_adapter()
    tolerance = TOLERANCE if format is None else 0.05
    assert float((output(ours, inputs) - before).norm()) <= tolerance * float(before.norm())
    plain = ours.merge_and_unload()
    assert not any(isinstance(module, PeftParamWrapper) for module in plain.modules())
    assert float((output(plain, inputs) - merged).norm()) <= tolerance * float(merged.norm())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.usefixtures("as_rewritten")
def test_copies_train_apart(how: str) -> None:
    ours, stock = quantized("nf4", "gpt_oss")
    inputs = batch(stock)
    trained(ours, inputs)
    twin = copy.deepcopy(ours) if how == "deepcopy" else pickle.loads(pickle.dumps(ours))
    expected = trained(copy.deepcopy(ours), inputs)
    assert max(largest(trained(twin, inputs), expected).values()) <= TOLERANCE


def test_packed_experts_keep_their_planes_and_their_state_dict() -> None:
    ours, _ = quantized("nf4")
    name, packed = next((n, m) for n, m in ours.named_modules() if isinstance(m, PackedExperts))
    before = [plane.clone() for plane in packed.tensors]
    ours.to(torch.bfloat16).half()
    for plane, kept in zip(packed.tensors, before, strict=True):
        assert plane.dtype == kept.dtype
        assert torch.equal(plane, kept)
    # What the weight would be now: the products' dtype.
    assert packed.dtype == torch.float16
    state = ours.state_dict()
    assert state[f"{name}.weight"].dtype == torch.uint8
    assert packed.packed.nbytes < 0.6 * packed.weight.numel() * 2
    other, _ = quantized("nf4")
    packed.weight.data.zero_()
    ours.load_state_dict(other.state_dict())
    assert torch.equal(packed.weight, before[0])


def test_what_is_left_alone_says_why() -> None:
    def reasons(model: Any) -> set[str | None]:
        return {site.reason for site in qlora_compile.explain(model).sites if site.experts}

    trainable = qlora_compile.optimize(toy(), tune="model")
    assert reasons(trainable) == {"the base weight is trained"}
    spread = toy().requires_grad_(False)
    for site in Inventory(spread).experts.values():
        module: Any = site.module
        module._is_expert_parallel = True
    spread = qlora_compile.optimize(spread, tune="model")
    assert reasons(spread) == {"its experts are spread over several devices"}
    own = qlora_compile.optimize(toy("dbrx").requires_grad_(False), tune="model")
    assert reasons(own) == {"DbrxExpertGLU computes its experts by code of its own"}
    with pytest.raises(StrictError, match="DbrxExpertGLU"):
        qlora_compile.optimize(toy("dbrx").requires_grad_(False), strict=True, tune="model")


@pytest.mark.usefixtures("as_rewritten")
def test_weights_that_begin_to_train_are_refused() -> None:
    ours = qlora_compile.optimize(toy().requires_grad_(False), tune="model")
    inputs = batch(ours)
    ours(**inputs)
    next(iter(Inventory(ours).experts.values())).weight.requires_grad_(True)
    torch._dynamo.reset()
    with pytest.raises(FrozenExpertsError, match="was frozen when optimize"):
        ours(**inputs)


def test_weights_that_are_not_finite_are_refused_before_anything_changes() -> None:
    model = toy()
    name, site = next(iter(Inventory(model).experts.items()))
    with torch.no_grad():
        site.weight[0, 1, 2] = torch.nan  # pyright: ignore[reportIndexIssue]
    with pytest.raises(WeightValueError, match=name):
        qlora_compile.optimize(model, lora(), quantize="nf4")
    assert not any(isinstance(m, QuantizedLinear | PackedExperts) for m in model.modules())
