"""Random programs of linears, shared inputs, residuals, casts and reshapes: every linear is fused,
and outputs and gradients stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.fx import GraphModule

import qlora_compile
from qlora_compile.passes.calls import base_weights, is_fused
from tests.passes.rewritten import rewritten_graphs
from tests.test_equality import without_inductor

__all__ = ["rewritten_graphs", "without_inductor"]

LINEARS = 3
STEPS: dict[str, Callable[[Any, Tensor, Tensor, int], Tensor]] = {
    "linear": lambda model, x, other, index: model.linears[index](x),
    "residual": lambda model, x, other, index: x + other,
    "gate": lambda model, x, other, index: torch.sigmoid(x) * other,
    "cast": lambda model, x, other, index: x.double().float(),
    "null cast": lambda model, x, other, index: x.to(torch.float32).contiguous(),
    "reshape": lambda model, x, other, index: x.view(-1, 2, 8).transpose(0, 1).reshape(x.shape),
    "in place": lambda model, x, other, index: x.clone().add_(other),
}

Step = tuple[str, int, int, int]


class Program(nn.Module):
    """Runs `steps` of (operation, two earlier values, linear); returns the sum of all values."""

    def __init__(self, steps: list[Step], bias: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(8, 8, bias) for _ in range(LINEARS)])
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for operation, first, second, index in self.steps:
            left, right = values[first % len(values)], values[second % len(values)]
            values.append(STEPS[operation](self, left, right, index))
        return torch.stack(values).sum(0)


small = st.integers(0, 7)
steps = st.lists(
    st.tuples(st.sampled_from(list(STEPS)), small, small, st.integers(0, LINEARS - 1)),
    min_size=1,
    max_size=8,
).map(lambda drawn: [("linear", 0, 0, 0), *drawn])


@pytest.mark.usefixtures("without_inductor")
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, bias=st.booleans(), adapted=st.sets(st.integers(0, LINEARS - 1), min_size=1))
def test_every_linear_is_fused_and_nothing_changes(
    steps: list[Step], bias: bool, adapted: set[int], rewritten_graphs: list[GraphModule]
) -> None:
    torch._dynamo.reset()
    rewritten_graphs.clear()
    config = LoraConfig(
        r=2, target_modules=[f"linears.{n}" for n in adapted], init_lora_weights=False
    )
    stock = get_peft_model(Program(steps, bias), config).train()
    ours = qlora_compile.optimize(copy.deepcopy(stock), scope="model")
    # The second number of rows makes their dimension a symbol.
    for rows in (4, 6):
        x = torch.randn(rows, 8)
        results = []
        for model in (stock, ours):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            y.square().sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append({"y": y, "x": leaf.grad} | grads)
        assert results[0].keys() == results[1].keys()
        for name, expected in results[0].items():
            # By norms: elements in which terms cancel carry the roundings of the others.
            error = (results[1][name] - expected).norm()
            assert error <= 1e-4 * expected.norm() + 1e-5, (name, error)

    used = [index for operation, *_, index in steps if operation == "linear"]
    assert len(rewritten_graphs) == 2
    for graph_module in rewritten_graphs:
        assert sum(
            len(base_weights(node)) for node in graph_module.graph.nodes if is_fused(node)
        ) == len(used)
    for site in qlora_compile.explain(ours).sites:
        index = int(site.name.rpartition(".")[2])
        assert site.fused == (index in used), str(site)
        assert site.rank == (2 if index in adapted else 0)
