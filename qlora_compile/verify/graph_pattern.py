"""Graph pattern: a digest of a rewritten graph that is the same in every process.

Layers and sequence lengths that share a graph, or could share one, have the same pattern.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qlora_compile.kernels.problem import bucket_rows
from qlora_compile.verify.check import CapturedInput


def graph_pattern(
    graph_module: GraphModule, inputs: Sequence[CapturedInput], args: Sequence[Any]
) -> str:
    """Return 16 hex digits of SHA-256 over the graph and its inputs.

    They cover the ops of `graph_module`, their connections and constants (formats among them), and
    the dtypes, devices and shapes of the inputs `args`. All dimensions of an activation but the
    last are rounded up as `Problem` rounds rows, even if they are constants in the graph.
    """
    rows = {
        size
        for each, arg in zip(inputs, args, strict=True)
        if isinstance(arg, Tensor) and not each.stored
        for size in arg.shape[:-1]
    }
    described_inputs = [_input(*pair) for pair in zip(inputs, args, strict=True)]
    devices = sorted({arg.device.type for arg in args if isinstance(arg, Tensor)})
    state = [torch.is_grad_enabled()]
    state += [str(torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)]
    described = [described_inputs, state, _graph(graph_module, frozenset(rows))]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _input(captured: CapturedInput, arg: Any) -> Any:
    if not isinstance(arg, Tensor):
        return type(arg).__name__
    shape = list(arg.shape)
    if not captured.stored:
        shape[:-1] = map(bucket_rows, shape[:-1])
    return [str(arg.dtype), arg.device.type, shape, arg.requires_grad]


def _graph(graph_module: GraphModule, rows: frozenset[int]) -> list[Any]:
    number = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    describe = functools.partial(_described, graph_module, number, rows)
    return [
        [node.op, _target(graph_module, node, rows), describe(node.args), describe(node.kwargs)]
        for node in _operations(graph_module.graph)
    ]


def _operations(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op != "placeholder"]


def _target(graph_module: GraphModule, node: Node, rows: frozenset[int]) -> Any:
    if node.op == "get_attr":
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, GraphModule):
            return _graph(value, rows)
        if isinstance(value, Tensor):
            return [str(value.dtype), list(value.shape)]
        return type(value).__name__
    if isinstance(node.target, (str, torch._ops.OpOverload)):
        return str(node.target)
    module = getattr(node.target, "__module__", "")
    # Not repr(), which contains memory addresses.
    return f"{module}.{getattr(node.target, '__qualname__', type(node.target).__name__)}"


def _described(
    graph_module: GraphModule, number: dict[Node, int], rows: frozenset[int], value: Any
) -> Any:
    describe = functools.partial(_described, graph_module, number, rows)
    if isinstance(value, Node):
        return ["node", number[value]]
    if isinstance(value, (list, tuple)):
        return [describe(each) for each in value]
    if isinstance(value, dict):
        return {str(key): describe(each) for key, each in value.items()}
    if isinstance(value, slice):
        return ["slice", *map(describe, (value.start, value.stop, value.step))]
    if type(value) is int:
        return bucket_rows(value) if value in rows else value
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return value.type
    return type(value).__name__
