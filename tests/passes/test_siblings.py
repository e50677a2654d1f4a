"""Linears that share their input: which become one group, and that it changes no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qlora_compile
from qlora_compile.capture.regions import region_of
from qlora_compile.kernels.problem import Sibling
from qlora_compile.modules.linear import QuantizedLinear
from tests.test_equality import without_inductor

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")

Body = Callable[[Any, Tensor], Tensor]


class Three(nn.Module):
    """Linears of different width, bias and storage over an input of 8."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 4, False), nn.Linear(8, 4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def joined(m: Any, x: Tensor) -> Tensor:
    return torch.cat((m.q(x), m.k(x), m.v(x)), dim=-1)


def between(m: Any, x: Tensor) -> Tensor:
    """Return what reads one before the next is computed."""
    q = torch.tanh(m.q(x))
    k = m.k(x) * q[..., :4]
    return torch.cat((q, k, m.v(x) + k), dim=-1)


def written_between(m: Any, x: Tensor) -> Tensor:
    x = x * 1.0
    q = m.q(x)
    x += 1.0
    return torch.cat((q, m.k(x), m.v(x)), dim=-1)


def view_written_between(m: Any, x: Tensor) -> Tensor:
    x = x * 1.0
    q = m.q(x)
    x.view(-1)[:3].mul_(2.0)
    return torch.cat((q, m.k(x), m.v(x)), dim=-1)


def outputs_written(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    k += v
    q[..., :4] *= k
    return torch.cat((q, k), dim=-1)


def one_unused(m: Any, x: Tensor) -> Tensor:
    m.k(x)
    return torch.cat((m.q(x), m.v(x)), dim=-1)


def one_without_gradient(m: Any, x: Tensor) -> Tensor:
    return torch.cat((m.q(x), m.k(x).detach(), m.v(x)), dim=-1)


def trained(body: Body, optimized: bool, adjust: Callable[[Any], None], **options: Any) -> Any:
    """Return the model after a step, its loss and all gradients."""
    torch.manual_seed(0)
    model: Any = Three(body)
    defaults = {"r": 2, "target_modules": ["q", "k", "v"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(**(defaults | options)))
    adjust(model.base_model.model)
    if optimized:
        model = qlora_compile.optimize(model)
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = model.train()(x)
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return model, {"y": y, "x": x.grad} | gradients


def groups(
    body: Body, adjust: Callable[[Any], None] = lambda model: None, **options: Any
) -> dict[str, tuple[Sibling, ...]]:
    """Assert that a step equals stock's; return the siblings computed with each Linear."""
    _, expected = trained(body, False, adjust, **options)
    model, actual = trained(body, True, adjust, **options)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)
    region = region_of(model.base_model.model)
    assert region is not None
    return {name: site.forward.siblings for name, site in region.fused().items()}


EVERY = (Sibling(12, 2, True), Sibling(4, 2, False), Sibling(4, 2, True))


@pytest.mark.parametrize("body", [joined, between, outputs_written], ids=lambda b: b.__name__)
def test_siblings_are_one_call(body: Body) -> None:
    assert groups(body) == {"q": EVERY, "k": EVERY, "v": EVERY}


@pytest.mark.parametrize("body", [one_unused, one_without_gradient], ids=lambda b: b.__name__)
def test_one_that_is_not_trained_gets_no_gradient(body: Body) -> None:
    used = {name: siblings for name, siblings in groups(body).items() if siblings}
    joined = EVERY if body is one_without_gradient else EVERY[::2]
    assert used == dict.fromkeys("qkv" if joined == EVERY else "qv", joined)


@pytest.mark.parametrize("body", [written_between, view_written_between], ids=lambda b: b.__name__)
def test_a_write_to_the_input_parts_them(body: Body) -> None:
    late = EVERY[1:]
    # Autograd would not let anybody write to what q's adapter keeps.
    assert groups(body, target_modules=["k", "v"]) == {"q": (), "k": late, "v": late}


def test_ranks_scalings_and_missing_adapters_mix() -> None:
    found = groups(joined, target_modules=["q", "v"], rank_pattern={"v": 5}, lora_bias=False)
    siblings = (Sibling(12, 2, True), Sibling(4, 0, False), Sibling(4, 5, True))
    assert found == dict.fromkeys("qkv", siblings)


def test_an_adapters_bias_is_moved_with_it() -> None:
    siblings = tuple(Sibling(each.n, 2, True) for each in EVERY)
    assert groups(joined, lora_bias=True) == dict.fromkeys("qkv", siblings)


def test_formats_are_grouped_apart() -> None:
    def adjust(model: Any) -> None:
        for name in ("q", "v"):
            base = getattr(model, name).base_layer
            packed = QuantizedLinear.from_linear(base, "int8", double_quantize=False)
            getattr(model, name).base_layer = packed

    packed = (EVERY[0], EVERY[2])
    assert groups(joined, adjust) == {"q": packed, "k": (), "v": packed}
