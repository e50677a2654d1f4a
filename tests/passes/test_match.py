"""What the passes fuse, what they leave with a reason, and that neither changes a result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qlora_compile
from qlora_compile.report import Report
from tests.test_equality import without_inductor

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")


class Pair(nn.Module):
    """Two linears and what a case does between them."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias), nn.Linear(8, 8, bias)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def chain(m: Any, x: Tensor) -> Tensor:
    return m.second(torch.tanh(m.first(x)))


def siblings(m: Any, x: Tensor) -> Tensor:
    return m.first(x) * m.second(x)


def residual(m: Any, x: Tensor) -> Tensor:
    return x + m.second(x + m.first(x))


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    y += x
    return m.second(y) + y


def reshaped(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x.view(2, -1, 8)).transpose(0, 1)).reshape(-1, 8)


def output_used_twice(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(y) + torch.relu(y) * y


def called_twice(m: Any, x: Tensor) -> Tensor:
    return m.second(m.second(m.first(x)))


def casts(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x.double().float().to(torch.float32)).to(torch.float64).float())


def dead_branch(m: Any, x: Tensor) -> Tensor:
    _ = m.first(x) * 3
    return m.second(m.first(x))


def dropped_outside(m: Any, x: Tensor) -> Tensor:
    return m.second(nn.functional.dropout(m.first(x), 0.5, training=False))


BODIES = (
    chain,
    siblings,
    residual,
    in_place,
    reshaped,
    output_used_twice,
    called_twice,
    casts,
    dead_branch,
    dropped_outside,
)


def compare(
    body: Callable[[Any, Tensor], Tensor],
    *,
    bias: bool = False,
    adjust: Callable[[Any], None] = lambda model: None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Report:
    """Train one step stock and optimised, assert equality, and return the report."""
    results, model = [], None
    for optimized in (False, True):
        torch.manual_seed(0)
        base = Pair(body, bias).to(dtype)
        defaults = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False}
        model = get_peft_model(base, LoraConfig(**(defaults | options)))
        adjust(model)
        if optimized:
            model = qlora_compile.optimize(model)
        x = torch.randn(6, 8, dtype=dtype, requires_grad=True)
        y = model.train()(x)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y, "x": x.grad} | grads)
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5)
    return qlora_compile.explain(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("body", BODIES)
def test_every_shape_of_module_is_fused_and_equal(body: Any, bias: bool) -> None:
    report = compare(body, bias=bias)
    assert report.fused == len(report.sites) == 2, str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rslora_ranks_and_scaling(dtype: torch.dtype) -> None:
    report = compare(
        chain, dtype=dtype, use_rslora=True, rank_pattern={"first": 3}, alpha_pattern={"first": 5}
    )
    assert report.fused == 2
    assert sorted(site.rank for site in report.sites) == [2, 3]


def test_a_trained_bias_gets_its_gradient() -> None:
    def train_biases(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.requires_grad_()

    assert compare(chain, bias=True, adjust=train_biases).fused == 2


class LowRank(nn.Module):
    """What a LoRA layer looks like, with Linears of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = (nn.Linear(n, k, bias=False) for n, k in DIMENSIONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


DIMENSIONS = ((8, 8), (8, 2), (2, 8))


@pytest.mark.parametrize("frozen", [("base",), ("base", "a", "b")])
def test_a_low_rank_branch_of_the_models_own_stays_linears(frozen: tuple[str, ...]) -> None:
    stock = LowRank()
    for name in frozen:
        stock.get_submodule(name).requires_grad_(False)
    ours = qlora_compile.optimize(copy.deepcopy(stock), scope="model")
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), stock(x))
    sites = qlora_compile.explain(ours).sites
    assert {site.name: site.fused for site in sites} == {n: n in frozen for n in ("base", "a", "b")}


PARTIAL = "its adapter's computation is not plain LoRA; the base product alone is fused"


def _second_adapter(model: Any) -> None:
    model.add_adapter(
        "b", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "b"])


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapters_bias_joins_the_bases(bias: bool, dropout: float) -> None:
    def without_dropout(model: Any) -> None:
        """Masks differ from stock's: the graph has it, its probability in the comparison is 0."""
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def biased(model: Any) -> None:
        without_dropout(model)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                nn.init.normal_(parameter)

    report = compare(chain, bias=bias, adjust=biased, lora_bias=True, lora_dropout=dropout)
    assert report.fused == 2


@pytest.mark.parametrize("count", [2, 3])
def test_several_adapters_are_one(count: int) -> None:
    def more(model: Any) -> None:
        names = ["default"]
        for index in range(1, count):
            names.append(f"adapter{index}")
            config = LoraConfig(
                r=2 + index,
                lora_alpha=3 * index,
                target_modules=["first", "second"],
                init_lora_weights=False,
            )
            model.add_adapter(names[-1], config)
        model.base_model.set_adapter(names)

    assert compare(chain, bias=True, adjust=more).fused == 2


@pytest.mark.parametrize(
    ("options", "adjust", "reason"),
    [
        ({"lora_dropout": 1e-12}, _second_adapter, "one of its adapters is fused"),
        ({"use_dora": True}, _second_adapter, PARTIAL),
    ],
    ids=["two adapters with dropout", "DoRA and another adapter"],
)
def test_what_is_not_plain_lora_is_left_exact_with_a_reason(
    options: Any, adjust: Any, reason: str
) -> None:
    report = compare(chain, bias=True, adjust=adjust, **options)
    assert report.fused == 0
    assert all(str(site.reason).startswith(reason) for site in report.sites), str(report)


class OwnLinear(nn.Linear):
    """A Linear that multiplies by itself, in one of the ways to write it."""

    def __init__(self, n: int, k: int, bias: bool, write: Any) -> None:
        super().__init__(n, k, bias)
        self.write = write

    def forward(self, input: Tensor) -> Tensor:
        y = self.write(input, self.weight)
        return y if self.bias is None else y + self.bias


WRITTEN = {
    "T": lambda x, w: x @ w.T,
    "t": lambda x, w: torch.matmul(x, w.t()),
    "mT": lambda x, w: x.matmul(w.mT),
    "transpose": lambda x, w: torch.matmul(x, w.transpose(1, 0)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN.keys())
def test_a_product_with_the_transposed_weight_is_a_linear(write: Any, bias: bool) -> None:
    def own(model: Any) -> None:
        for name in ("first", "second"):
            layer = model.base_model.model.get_submodule(name)
            plain = layer.base_layer
            layer.base_layer = OwnLinear(8, 8, bias, write).requires_grad_(False)
            layer.base_layer.load_state_dict(plain.state_dict())

    assert compare(chain, bias=bias, adjust=own).fused == 2


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("bias_first", [False, True])
@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize("inside", [None, True, False])
def test_a_product_under_autocast_is_stocks(
    write: Any, bias_first: bool, dtypes: Any, inside: bool | None
) -> None:
    """The product is in bfloat16 there, and its sum with a bias in float32 is in float32. inside:
    whether the layer switches autocast on or off itself."""

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if inside is None:
                return self.sum(input)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                return self.sum(input.float())

        def sum(self, x: Tensor) -> Tensor:
            y = write(x, self.weight)
            return self.bias + y if bias_first else y + self.bias

    weight, bias = dtypes
    torch.manual_seed(0)
    layers = [Own(8, 8).to(weight).requires_grad_(False) for _ in range(2)]
    for layer in layers:
        layer.bias.data = layer.bias.data.to(bias)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    ours = qlora_compile.optimize(copy.deepcopy(model))
    x = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside is not True):
        expected, actual = model(x), ours(x)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert qlora_compile.explain(ours).fused == 2


def test_a_weight_used_past_its_layer_is_named() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer.weight @ self.other(x).t()).t()

    model = Past().requires_grad_(requires_grad=False)
    x = torch.randn(3, 8)
    expected = model(x)
    model = qlora_compile.optimize(model)
    torch.testing.assert_close(model(x), expected)
    layer, other = qlora_compile.explain(model).sites
    assert layer.reason == "the model computes with its weight without calling the layer"
    assert other.fused
