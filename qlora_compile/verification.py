"""Numerical check of a rewrite: the rewritten graph against the captured one, on real inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from qlora_compile.passes.nodes import arguments, is_group, is_qlora_linear

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative difference, in the Frobenius norm, of two valid orders of one computation."""


def verify_rewrite(
    original: GraphModule, rewritten: GraphModule, args: Sequence[Any]
) -> str | None:
    """Compares outputs and the gradients of all inputs, with dropout off in both graphs.

    Returns None when they agree, else what differs and by how much.
    """
    results = []
    for graph_module in (original, rewritten):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(_outputs_and_gradients(_undropped(graph_module), args))
    for (name, expected), (_, actual) in zip(*results, strict=True):
        if (expected is None) != (actual is None):
            return f"{name} is missing on one side"
        if expected is None or actual is None:
            continue
        if not (expected.is_floating_point() and actual.is_floating_point()):
            if not torch.equal(expected, actual):
                return f"{name} differs"
            continue
        reference = expected.double()
        scale = reference.norm().clamp_min(1e-30)
        difference = float((actual.double() - reference).norm() / scale)
        tolerance = _TOLERANCES[min((expected.dtype, actual.dtype), key=_precision)]
        tolerance = max(tolerance, _TOLERANCES[_lowest_precision(args)])
        if not difference <= tolerance:
            return f"{name} differs by {difference:.1e} of its norm, allowed {tolerance:.0e}"
    return None


def _precision(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


def _lowest_precision(args: Sequence[Any]) -> torch.dtype:
    dtypes = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    for device in {a.device.type for a in args if isinstance(a, Tensor)}:
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
    return min((d for d in dtypes if d in _TOLERANCES), key=_precision)


def _undropped(graph_module: GraphModule) -> GraphModule:
    graph_module = copy.deepcopy(graph_module)
    for node in graph_module.graph.nodes:
        if is_qlora_linear(node) or is_group(node):
            node.args = tuple((arguments(node) | {"dropout": 0.0, "seed": None}).values())
        elif node.target is torch.nn.functional.dropout:
            node.args, node.kwargs = node.args[:1], {"p": 0.0}
        elif node.target is torch.nn.functional.scaled_dot_product_attention:
            # query, key, value, attn_mask; dropout_p is the fifth.
            node.args = (*node.args[:4], 0.0, *node.args[5:]) if len(node.args) > 4 else node.args
            if len(node.args) <= 4:
                node.kwargs = dict(node.kwargs) | {"dropout_p": 0.0}
    graph_module.recompile()
    return graph_module


def _outputs_and_gradients(
    graph_module: GraphModule, args: Sequence[Any]
) -> list[tuple[str, Tensor | None]]:
    fresh = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in args
    ]
    leaves = [a for a in fresh if isinstance(a, Tensor) and a.requires_grad]
    names = [
        node.name
        for node, a in zip(graph_module.graph.find_nodes(op="placeholder"), fresh, strict=True)
        if isinstance(a, Tensor) and a.requires_grad
    ]
    outputs = [o for o in tree_flatten(graph_module(*fresh))[0] if isinstance(o, Tensor)]
    results: list[tuple[str, Tensor | None]] = [
        (f"output {index}", output.detach()) for index, output in enumerate(outputs)
    ]
    differentiable = [o for o in outputs if o.requires_grad]
    if differentiable and leaves:
        generator = torch.Generator().manual_seed(0)
        weights = [
            torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in differentiable
        ]
        gradients = torch.autograd.grad(differentiable, leaves, weights, allow_unused=True)
        results += [(f"gradient of {n}", g) for n, g in zip(names, gradients, strict=True)]
    return results
