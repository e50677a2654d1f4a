"""Attention with our backward: which calls are replaced, and which are left to torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import qlora_compile
from qlora_compile.kernels.attention import ATTENTION
from qlora_compile.passes import attention as attention_pass
from tests.passes.rewritten import rewritten_graphs
from tests.test_equality import without_inductor

__all__ = ["rewritten_graphs", "without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor", "any_cpu")

Body = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op computes without AMX, too: its gradients are torch's there."""

    def expected(*operands: Tensor) -> bool:
        return all(each.dtype == torch.bfloat16 for each in operands)

    monkeypatch.setattr(attention_pass, "expected", expected)


class Attending(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.projections = nn.ModuleList(nn.Linear(32, n) for n in (32, 16, 16))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, 8)).transpose(1, 2) for each in self.projections)
        return self.body(q, k, v).transpose(1, 2).flatten(2)


def replaced(
    body: Body, graphs: list[GraphModule], dtype: torch.dtype = torch.bfloat16, trains: bool = True
) -> int:
    """Return how many attentions are replaced in a model that computes `body`; it computes the
    same."""
    torch.manual_seed(0)
    stock = Attending(body).to(dtype)
    ours = qlora_compile.optimize(copy.deepcopy(stock), scope="model")
    x = torch.randn(2, 12, 32, dtype=dtype)
    results = []
    for model in (stock, ours):
        own = x.clone().requires_grad_(trains)
        torch.manual_seed(1)
        y = model(own)
        results.append([y, *([torch.autograd.grad(y.sum(), own)[0]] if trains else [])])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.01)
    return sum(len(g.graph.find_nodes(op="call_function", target=ATTENTION)) for g in graphs)


MASK = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.8
REPLACED: dict[str, Any] = {
    "causal": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ),
    "by position": lambda q, k, v: scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), None, 0.0, False
    ),
    "by name": lambda q, k, v: scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=MASK, scale=0.2, enable_gqa=True
    ),
}
LEFT: dict[str, Any] = {
    "dropout": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, dropout_p=0.5, enable_gqa=True
    ),
    "a mask with a gradient": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, (q @ k.repeat_interleave(2, 1).mT), enable_gqa=True
    ),
    "three dimensions": lambda q, k, v: scaled_dot_product_attention(
        q[:, 0], k[:, 0], v[:, 0]
    ).unsqueeze(1),
    "a value of another width": lambda q, k, v: scaled_dot_product_attention(
        q, k, v[..., :4], enable_gqa=True
    ),
}


@pytest.mark.parametrize("body", REPLACED.values(), ids=REPLACED)
def test_replaced(body: Body, rewritten_graphs: list[GraphModule]) -> None:
    assert replaced(body, rewritten_graphs) == 1


@pytest.mark.parametrize("body", LEFT.values(), ids=LEFT)
def test_left_to_torch(body: Body, rewritten_graphs: list[GraphModule]) -> None:
    assert replaced(body, rewritten_graphs) == 0


def test_kernels_that_the_model_names_are_left(rewritten_graphs: list[GraphModule]) -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    assert replaced(body, rewritten_graphs) == 0


def test_without_gradients_or_bfloat16(rewritten_graphs: list[GraphModule]) -> None:
    assert replaced(REPLACED["causal"], rewritten_graphs, trains=False) == 0
    assert replaced(REPLACED["causal"], rewritten_graphs, dtype=torch.float32) == 0
