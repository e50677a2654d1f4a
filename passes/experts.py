"""The experts' op in a graph: modules call it themselves, so that there is nothing to match."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qlora_compile.kernels.call import Call
from qlora_compile.kernels.experts.op import QLORA_EXPERTS, experts_problem, experts_tensors
from qlora_compile.passes.context import FusedExperts, PassContext
from qlora_compile.passes.nodes import example, stored_weight


def is_experts(node: Node) -> bool:
    """Whether `node` is a call of the experts' op."""
    return node.op == "call_function" and node.target is QLORA_EXPERTS


def experts_weight(node: Node) -> Any:
    """The placeholder of the weight that a call of the experts' op multiplies with."""
    x, tensors, _, text = node.args
    return stored_weight(experts_tensors(Call.parse(str(text)), x, tensors).planes[0])  # type: ignore[arg-type]


def record_experts(graph_module: GraphModule, context: PassContext) -> None:
    """Reads off the graph which sites of `context` the experts' op computes."""
    for node in filter(is_experts, graph_module.graph.nodes):
        site = context.experts_site_of(experts_weight(node))
        if site is not None:
            x = example(node.args[0])
            assert x is not None
            rows: Any = x.shape[0]
            # A dynamic dimension stands for many, what it was at capture is one.
            rows = rows if isinstance(rows, int) else rows.node.hint or 0
            forward = experts_problem(Call.parse(str(node.args[3])), "forward", rows, x)
            context.experts[site] = FusedExperts(forward, trains=torch.is_grad_enabled())
