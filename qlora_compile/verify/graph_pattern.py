"""The pattern of a rewritten graph: a digest that is the same in every process, and for layers and
lengths that share a graph or could."""

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
    """Hex digits for the ops of `graph_module` and how they are connected, their constants (formats
    among them), and dtypes, devices and shapes of the inputs `args`. All dimensions but the last
    of an activation are rounded up as `Problem` rounds rows, also where the graph names them.
    """
    rows = {
        size
        for each, arg in zip(inputs, args, strict=True)
        if isinstance(arg, Tensor) and not each.stored
        for size in arg.shape[:-1]
    }
    inputs_told = [_input(*pair) for pair in zip(inputs, args, strict=True)]
    devices = sorted({arg.device.type for arg in args if isinstance(arg, Tensor)})
    state = [torch.is_grad_enabled()]
    state += [str(torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)]
    told = [inputs_told, state, _graph(graph_module, frozenset(rows))]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _input(captured: CapturedInput, arg: Any) -> Any:
    if not isinstance(arg, Tensor):
        return type(arg).__name__
    shape = list(arg.shape)
    if not captured.stored:
        shape[:-1] = map(bucket_rows, shape[:-1])
    return [str(arg.dtype), arg.device.type, shape, arg.requires_grad]


def _graph(graph_module: GraphModule, rows: frozenset[int]) -> list[Any]:
    number = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    tell = functools.partial(_told, graph_module, number, rows)
    return [
        [node.op, _target(graph_module, node, rows), tell(node.args), tell(node.kwargs)]
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
    # Not repr(), which holds addresses.
    return f"{module}.{getattr(node.target, '__qualname__', type(node.target).__name__)}"


def _told(
    graph_module: GraphModule, number: dict[Node, int], rows: frozenset[int], value: Any
) -> Any:
    tell = functools.partial(_told, graph_module, number, rows)
    if isinstance(value, Node):
        return ["node", number[value]]
    if isinstance(value, (list, tuple)):
        return [tell(each) for each in value]
    if isinstance(value, dict):
        return {str(key): tell(each) for key, each in value.items()}
    if isinstance(value, slice):
        return ["slice", *map(tell, (value.start, value.stop, value.step))]
    if type(value) is int:
        return bucket_rows(value) if value in rows else value
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return value.type
    return type(value).__name__
