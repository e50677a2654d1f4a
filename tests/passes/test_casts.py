"""Casts and copies that change no value are looked through, and gone from the rewritten graph."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.fx import GraphModule

import qlora_compile
from bench.stock import with_bitsandbytes
from qlora_compile.kernels.op import QLORA_LINEAR
from qlora_compile.passes.calls import is_fused
from tests.passes.rewritten import rewritten_graphs
from tests.test_equality import without_inductor

__all__ = ["rewritten_graphs", "without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")


class Branched(nn.Module):
    """A frozen linear and a low-rank branch whose inputs are casts of one value."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.body = body

    def branch(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.a), self.b) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def cast_apart(m: Any, x: Tensor) -> Tensor:
    return m.base(x.double().float()) + m.branch(x.contiguous())


def cast_written(m: Any, x: Tensor) -> Tensor:
    wide = x.double()
    wide.add_(1)
    return m.base(wide.float()) + m.branch(x)


def source_written(m: Any, x: Tensor) -> Tensor:
    x = x + 1
    wide = x.double()
    x.mul_(3)
    return m.base(wide.float()) + m.branch(x)


@pytest.mark.parametrize(
    ("body", "branch_fused"), [(cast_apart, True), (cast_written, False), (source_written, False)]
)
def test_casts_are_looked_through_unless_written_to(
    body: Any, branch_fused: bool, rewritten_graphs: list[GraphModule]
) -> None:
    stock = Branched(body)
    ours = qlora_compile.optimize(copy.deepcopy(stock), scope="model")
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), stock(x))
    (graph_module,) = rewritten_graphs
    targets = [node.target for node in graph_module.graph.nodes]
    assert targets.count(QLORA_LINEAR) == 1
    assert targets.count(nn.functional.linear) == (0 if branch_fused else 2)


def test_a_change_of_memory_format_stays(rewritten_graphs: list[GraphModule]) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        last = x.view(3, 2, 2, 2).to(memory_format=torch.channels_last)
        return m.base(last.permute(0, 2, 3, 1).view(3, 8)) + m.branch(x)

    stock = Branched(body)
    ours = qlora_compile.optimize(copy.deepcopy(stock), scope="model")
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), stock(x))


def test_casts_clones_and_dropouts_of_the_branch_disappear(
    rewritten_graphs: list[GraphModule],
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    base = with_bitsandbytes(Model().to(torch.bfloat16), 4)
    config = LoraConfig(r=2, target_modules=["proj"], lora_dropout=0.1)
    model = qlora_compile.optimize(get_peft_model(base, config)).train()
    model(torch.randn(3, 64, dtype=torch.bfloat16)).sum().backward()
    (graph_module,) = rewritten_graphs
    calls = [n for n in graph_module.graph.nodes if n.op in ("call_function", "call_method")]
    kept = [node.target for node in calls if not is_fused(node)]
    # The seed, and reading the result.
    assert kept == [torch.randint, operator.getitem]
    assert len(calls) == 3
