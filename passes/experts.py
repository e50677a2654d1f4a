"""The experts' op in a graph: modules already call it, so no pass has to match anything."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qlora_compile.kernels.call import Call
from qlora_compile.kernels.experts.op import QLORA_EXPERTS, experts_problem
from qlora_compile.kernels.linear_call import tensor_indices
from qlora_compile.kernels.op import hinted_rows
from qlora_compile.passes.context import FusedExperts, PassContext
from qlora_compile.passes.nodes import example, is_call, stored_weight


def is_experts(node: Node) -> bool:
    return is_call(node, QLORA_EXPERTS)


def experts_weight(node: Node) -> Any:
    """Return the placeholder of the weight that `node`, a call of the experts' op, reads."""
    _, tensors, _, text = node.args
    (indices,) = tensor_indices(Call.parse(str(text)))
    return stored_weight(indices.named(tensors)["planes"][0])  # type: ignore[arg-type]


def record_experts(graph_module: GraphModule, context: PassContext) -> None:
    """Record in `context.experts` the sites that calls of the experts' op compute."""
    for node in filter(is_experts, graph_module.graph.nodes):
        site = context.experts_site_of(experts_weight(node))
        if site is not None:
            x = example(node.args[0])
            assert x is not None
            call = Call.parse(str(node.args[3]))
            forward = experts_problem(call, "forward", hinted_rows(x, call.k), x)
            context.experts[site] = FusedExperts(forward, trains=torch.is_grad_enabled())
