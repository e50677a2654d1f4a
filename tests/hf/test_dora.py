"""DoRA: factored, fused and equal to stock PEFT, on plain, bitsandbytes' and our own bases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import qlora_compile
from bench.agreement import Errors, distance
from qlora_compile.kernels.registry import FORMATS, format_named
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.passes.calls import is_fused
from tests.passes.rewritten import rewritten_graphs
from tests.test_equality import (
    BF16_FACTOR,
    FLOAT32_TOLERANCE,
    _round_trip,
    lora,
    step,
    without_inductor,
)
from tests.toy_models import tokens, toy, with_bitsandbytes

__all__ = ["rewritten_graphs", "without_inductor"]


class Setting(NamedTuple):
    base: str
    dtype: torch.dtype
    dropout: float
    bias: bool
    rslora: bool


SETTINGS = (
    Setting("plain", torch.float64, 0.0, True, False),
    Setting("plain", torch.float64, 0.2, False, True),
    Setting("bnb-4bit", torch.float32, 0.0, False, True),
    Setting("bnb-4bit", torch.float32, 0.2, True, False),
    Setting("bnb-8bit", torch.float32, 0.0, True, False),
    Setting("nf4", torch.float32, 0.0, True, True),
    Setting("int8", torch.float32, 0.2, True, False),
)
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6}


def dora(dropout: float = 0.0, **options: Any) -> LoraConfig:
    return lora(dropout, use_dora=True, **options)


class Chain(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128, bias), nn.Linear(128, 64, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def get_output_embeddings(self) -> None:
        return None


def build(base: str, dtype: torch.dtype, config: LoraConfig, model: Any) -> list[Any]:
    """Return a stock PeftModel of `model` with DoRA, and the optimised one with the same
    weights."""
    models: list[Any] = []
    own = base in {each.name for each in FORMATS}
    for optimized in (False, True):
        made = copy.deepcopy(model).to(dtype)
        if base.startswith("bnb"):
            made = with_bitsandbytes(made, int(base[4]))
        if own and not optimized:
            _round_trip(made, base)
        torch.manual_seed(1)
        if optimized and own:
            made = qlora_compile.optimize(made, copy.deepcopy(config), quantize=base)
        else:
            made = get_peft_model(made, copy.deepcopy(config))
            made = qlora_compile.optimize(made) if optimized else made
        models.append(made.train())
    stock = dict(models[0].named_parameters())
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if "magnitude" in name:
                torch.testing.assert_close(parameter.float(), stock[name].float())
                stock[name].mul_(torch.linspace(0.7, 1.4, len(parameter)))
            if "lora_" in name:
                parameter.copy_(stock[name])
    return models


def trained(model: Any, x: Tensor, autocast: bool = False, call: Any = None) -> dict[str, Tensor]:
    """Return the output and all gradients of a step in which each model draws the same masks:
    dropout before both products is torch's own."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x) if call is None else call(model, x)
    (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    assert sum("magnitude" in name for name in gradients) == 2
    return {"logits": y.detach().double(), "x": x.grad.double(), **gradients}


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s)))
def test_a_training_step_equals_stock(setting: Setting) -> None:
    config = dora(setting.dropout, use_rslora=setting.rslora, target_modules=["first", "second"])
    torch.manual_seed(0)
    stock, ours = build(setting.base, setting.dtype, config, Chain(setting.bias))
    x = torch.randn(3, 5, 64, dtype=setting.dtype)
    counters.clear()
    for group, error in distance(trained(ours, x), trained(stock, x)).items():
        assert error < TOLERANCES[setting.dtype], group
    assert not counters["graph_break"]
    report = qlora_compile.explain(ours)
    assert [site.rank for site in report.sites if site.fused] == [4, 4], str(report)


@pytest.mark.usefixtures("without_inductor")
def test_a_language_model_trains_as_stock() -> None:
    stock, ours = build("nf4", torch.float32, dora(), toy("Llama", attention_bias=True))
    ids = tokens()
    for group, error in distance(step(ours, ids), step(stock, ids)).items():
        assert error < FLOAT32_TOLERANCE, group
    report = qlora_compile.explain(ours)
    assert report.fused == len(report.sites) - 1, str(report)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16 adapters", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_low_precision_is_as_near_to_float64_as_stock(precision: str, dropout: float) -> None:
    autocast = precision == "autocast"
    dtype = torch.float32 if autocast else torch.bfloat16
    torch.manual_seed(0)
    config = dora(dropout, target_modules=["first", "second"])
    stock, ours = build("plain", dtype, config, Chain(bias=True))
    if precision == "bfloat16 adapters":
        for name, parameter in (*stock.named_parameters(), *ours.named_parameters()):
            parameter.data = parameter.data.to(dtype) if "lora_" in name else parameter.data
    exact = copy.deepcopy(stock).double()
    errors = Errors()
    for _ in range(4):
        x = torch.randn(3, 20, 64, dtype=dtype)
        mine, theirs = (trained(model, x, autocast) for model in (ours, stock))
        errors.add(mine, theirs, trained(exact, x.double()))
    for group, (mine, theirs) in errors.by_group().items():
        assert mine <= BF16_FACTOR * theirs, group
    assert qlora_compile.explain(ours).fused == 2


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(reentrant: bool) -> None:
    config = dora(0.3, target_modules=["first", "second"])
    torch.manual_seed(0)
    _, ours = build("nf4", torch.float32, config, Chain(bias=True))
    x = torch.randn(5, 64)

    def recomputed(model: Any, x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=reentrant)

    for group, error in distance(trained(ours, x, call=recomputed), trained(ours, x)).items():
        assert error < FLOAT32_TOLERANCE, group


class One(nn.Module):
    def __init__(self, n: int, k: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def layer(n: int, k: int, quantize: Any = None, **options: Any) -> tuple[Any, Any]:
    """Return a PeftModel with DoRA over one Linear, optimised, and its adapter layer."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"r": 3, "target_modules": ["linear"], "init_lora_weights": False}
    model = qlora_compile.optimize(
        One(n, k),
        LoraConfig(use_dora=True, **(arguments | options)),
        quantize=quantize,
        tune="model",
    )
    return model, model.base_model.model.linear


@pytest.mark.usefixtures("without_inductor")
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    rank=st.integers(1, 20),
    quantize=st.sampled_from([None, *(each.name for each in FORMATS)]),
    cancel=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_the_norm_by_factors_is_the_norm(
    n: int, k: int, rank: int, quantize: Any, cancel: float
) -> None:
    """`cancel`: how much of W's best approximation of that rank the adapter takes away."""
    _, module = layer(n, k, quantize, r=rank)
    base = module.get_base_layer()
    weight = (base.dequantize(torch.float32) if quantize else base.weight).detach().double()
    if cancel:
        u, s, v = torch.linalg.svd(weight)
        rank = min(rank, n, k)
        with torch.no_grad():
            module.lora_A["default"].weight.zero_()[:rank] = v[:rank]
            module.lora_B["default"].weight.zero_()[:, :rank] = -u[:, :rank] * s[:rank] * cancel
        module.scaling["default"] = 1.0
    a, b = (f["default"].weight.detach().double() for f in (module.lora_A, module.lora_B))
    delta = module.scaling["default"] * b @ a
    with torch.no_grad():
        module.lora_magnitude_vector["default"].weight.fill_(1.0)
        norms = 1 / module.dora_scale("default").double()
    exact = (weight + delta).norm(dim=1)
    # Rounding is relative to what is summed, not to what W and the adapter, or its ranks among
    # themselves, leave of it.
    ranks = module.scaling["default"] * b.abs() @ a.norm(dim=1)
    summed = weight.square().sum(dim=1) + ranks.square()
    error = (norms.square() - exact.square()).abs()
    assert bool((error <= 8 * torch.finfo(torch.float32).eps * summed).all())


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_graph_holds_nothing_as_large_as_the_weight(
    quantize: Any, dropout: float, rewritten_graphs: list[GraphModule]
) -> None:
    n, k = 48, 40
    model, _ = layer(n, k, quantize, lora_dropout=dropout)
    model.train()(torch.randn(5, k)).sum().backward()
    (graph,) = rewritten_graphs
    computed = [node for node in graph.graph.nodes if node.op != "placeholder"]
    examples = [node.meta.get("example_value") for node in computed]
    sizes = [value.numel() for value in examples if isinstance(value, Tensor)]
    assert max(sizes) < n * k
    # W Aᵀ, the adapted product, and with dropout what that left out.
    assert sum(is_fused(node) for node in computed) == (3 if dropout else 2)


def test_through_inductor_the_backward_drops_what_the_forward_dropped() -> None:
    """Given a mask the layer is affine in x: x · dL/dx is L less what the bias gives it."""
    model, module = layer(24, 64, "nf4", lora_dropout=0.5)
    x, weights = torch.randn(7, 64, requires_grad=True), torch.randn(7, 24)
    # Recomputed, too: the region lies in the checkpoint.
    y = checkpoint(model.train(), x, use_reentrant=False)
    loss = (weights * y).sum()
    loss.backward()
    assert x.grad is not None
    expected = loss - (weights * module.get_base_layer().bias).sum()
    torch.testing.assert_close((x * x.grad).sum(), expected, rtol=1e-4, atol=1e-3)
    assert qlora_compile.explain(model).fused == 1


def outputs(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("quantize", [None, *{f.bits: f.name for f in reversed(FORMATS)}.values()])
def test_merging_switching_off_and_back(quantize: Any, safe: bool) -> None:
    model, module = layer(24, 64, quantize)
    model.eval()
    x = torch.randn(5, 64)
    adapted, base = outputs(model, x), module.get_base_layer()
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, x), base(x))
    assert not torch.allclose(adapted, base(x), atol=1e-2)
    tolerance = {4: 0.25, 8: 0.02}[format_named(quantize).bits] if quantize else 1e-5
    scale = float(adapted.abs().max())
    model.merge_adapter(safe_merge=safe)
    assert float((outputs(model, x) - adapted).abs().max()) < tolerance * scale
    torch.testing.assert_close(outputs(model, x), base(x))
    model.unmerge_adapter()
    # The base has been packed twice since: the norm must be that of what it is now.
    weight = base.dequantize(torch.float32) if quantize else base.weight
    torch.testing.assert_close(module.base_squared_norms, weight.detach().square().sum(dim=1))
    assert float((outputs(model, x) - adapted).abs().max()) < 2 * tolerance * scale


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_two_adapters_are_exact_and_named(quantize: Any) -> None:
    """PEFT scales what the adapters before have added, too."""
    model, module = layer(24, 64, quantize)
    more = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False, use_dora=True)
    model.add_adapter("more", more)
    model.base_model.set_adapter(["default", "more"])
    x = torch.randn(5, 64)
    base = module.get_base_layer()
    weight = (base.dequantize(torch.float32) if quantize else base.weight).detach()
    expected = x @ weight.T
    with torch.no_grad():
        for name in ("default", "more"):
            magnitude = module.lora_magnitude_vector[name].weight
            magnitude.mul_(1.3)
            delta = module.get_delta_weight(name)
            scale = magnitude / (weight + delta).norm(dim=1)
            expected = scale * (expected + x @ delta.T)
    torch.testing.assert_close(model(x), expected + base.bias, rtol=1e-4, atol=1e-5)
    (site,) = qlora_compile.explain(model).sites
    assert "not plain LoRA" in str(site.reason)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("dora", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("format", [None, *(each.name for each in FORMATS)])
def test_two_adapters_merge_as_in_peft(format: str | None, dora: tuple[bool, bool]) -> None:
    """And are unmerged to the bytes from before."""
    torch.manual_seed(0)
    plain: Any = nn.Sequential(nn.Linear(64, 24))
    configs = [
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=each)
        for each in dora
    ]
    ours = qlora_compile.optimize(copy.deepcopy(plain), configs[0], quantize=format, tune="model")
    stock: Any = get_peft_model(plain, copy.deepcopy(configs[0]))
    base = ours.base_model.model[0].base_layer
    if format is not None:
        stock.base_model.model[0].base_layer.weight.data = base.dequantize(torch.float32)
    for model in (ours, stock):
        model.add_adapter("more", copy.deepcopy(configs[1]))
        model.base_model.set_adapter(["default", "more"])
        torch.manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data.uniform_(0.5, 1.0)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.merge_adapter()
    stock.merge_adapter()
    expected = stock.base_model.model[0].base_layer.weight.detach()
    found = base.weight.detach()
    if format is not None:
        again = copy.deepcopy(base)
        again.requantize(expected)
        expected, found = again.dequantize(torch.float32), base.dequantize(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours.unmerge_adapter()
    for name, tensor in ours.state_dict().items():
        exact = format is not None
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0 if exact else 1e-4)


@pytest.mark.usefixtures("without_inductor")
def test_an_adapter_that_changes_the_base_weight_has_the_norm_measured_again() -> None:
    model, module = layer(24, 64)
    x = torch.randn(5, 64)
    model.add_adapter("p", LoraConfig(r=2, target_modules=["linear"], init_lora_weights="pissa"))
    weight = module.get_base_layer().weight.detach()
    torch.testing.assert_close(module.base_squared_norms, weight.square().sum(dim=1))
    assert outputs(model, x).isfinite().all()


@pytest.mark.usefixtures("without_inductor")
def test_loading_a_base_weight_measures_it_again() -> None:
    model, module = layer(24, 64)
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    assert not any("squared" in name for name in state)
    model.load_state_dict(state)
    weight = module.get_base_layer().weight
    torch.testing.assert_close(module.base_squared_norms, weight.square().sum(dim=1))
    model.to(torch.bfloat16)
    assert module.base_squared_norms.dtype == torch.float32


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_files_are_stock_pefts(quantize: Any, tmp_path: Path) -> None:
    model, module = layer(24, 64, quantize)
    with torch.no_grad():
        module.lora_magnitude_vector["default"].weight.mul_(1.5)
    x = torch.randn(5, 64)
    expected = outputs(model.eval(), x)
    model.save_pretrained(tmp_path)
    base = One(24, 64)
    linear = module.get_base_layer()
    weight = linear.dequantize(torch.float32) if quantize else linear.weight
    base.linear.load_state_dict({"weight": weight, "bias": linear.bias})
    stock = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(outputs(stock.eval(), x), expected, rtol=1e-4, atol=1e-5)
    again = qlora_compile.optimize(copy.deepcopy(stock))
    torch.testing.assert_close(outputs(again, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_stock_model_is_quantised_under_its_dora(transposed: bool, attach_first: bool) -> None:
    torch.manual_seed(0)
    model: Any = One(24, 64)
    if transposed:
        model.linear = Conv1D(24, 64)
    config = LoraConfig(
        target_modules=["linear"],
        use_dora=True,
        init_lora_weights=False,
        fan_in_fan_out=transposed,
    )
    if attach_first:
        model = qlora_compile.optimize(get_peft_model(model, config), quantize="int8")
    else:
        model = qlora_compile.optimize(model, config, quantize="int8")
    module = model.base_model.model.linear
    base = module.get_base_layer()
    assert isinstance(base, QuantizedLinear)
    x = torch.randn(5, 64)
    weight = (base.dequantize() + module.get_delta_weight("default")).detach()
    magnitude = module.lora_magnitude_vector["default"].weight
    expected = x @ (weight / weight.norm(dim=1, keepdim=True) * magnitude[:, None]).T + base.bias
    torch.testing.assert_close(magnitude, weight.norm(dim=1), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert qlora_compile.explain(model).fused == 1
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0.0, atol=0.05)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_base_weight_may_be_trained(dropout: float, compiled: bool) -> None:
    """The norms are those of the present weight, and it gets no gradient through them."""
    torch.manual_seed(0)
    config = dora(dropout, target_modules=["first", "second"])
    models = build("plain", torch.float32, config, Chain(True))
    optimizers = []
    for model in models:
        model.get_base_model().first.base_layer.weight.requires_grad_(True)
        optimizers.append(torch.optim.SGD(model.parameters(), lr=0.05))
    stance: Any = "default" if compiled else "force_eager"
    with torch.compiler.set_stance(stance):
        for _ in range(3):
            x = torch.randn(3, 5, 64)
            stock, ours = (trained(model, x) for model in models)
            assert any("base_layer" in name for name in stock)
            for group, error in distance(ours, stock).items():
                # Of steps that each add to the rounding of the one before.
                assert error < 5 * TOLERANCES[torch.float32], group
            for optimizer in optimizers:
                optimizer.step()
