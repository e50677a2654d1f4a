"""Attention: replaces torch's op by ours where our backward pass is the faster one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_compile.kernels.attention import ATTENTION, TORCH_FORWARD, attention_call, expected
from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import example, insert_before, replace_node

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
_NAMES = ("query", "key", "value", *_DEFAULTS)


def replace_attention(graph_module: GraphModule, context: PassContext) -> int:
    """Rewrite scaled_dot_product_attention(q, k, v, …)  ⇒  qlora_compile::attention(q, k, v, …).

    Only where torch would use its flash attention for CPUs, and where q, k or v require a gradient
    and the mask does not. Returns the number of rewrites.
    """
    if graph_module.graph.find_nodes(op="call_function", target=torch.nn.attention._sdpa_kernel):
        return 0  # The model chooses its attention kernels itself.
    rewritten = 0
    for node in graph_module.graph.find_nodes(op="call_function", target=_ATTENTION):
        call = _DEFAULTS | dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
        if _is_replaced(node, call):
            operands = [call[name] for name in ("query", "key", "value", "attn_mask")]
            text = attention_call(call["is_causal"], call["scale"])
            replace_node(node, insert_before(node, ATTENTION, (*operands, text)))
            rewritten += 1
    return rewritten


def _is_replaced(node: Node, call: dict[str, Any]) -> bool:
    query, key, value = (example(call[name]) for name in ("query", "key", "value"))
    mask = example(call["attn_mask"])
    if query is None or key is None or value is None or call["dropout_p"]:
        return False
    if query.dim() != 4:
        return False  # Some versions of torch add the fourth dimension for their kernel.
    if isinstance(call["is_causal"], Node) or isinstance(call["scale"], Node):
        return False  # The model computes the scale, from a length that varies.
    trains = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    if not trains or (mask is not None and mask.requires_grad):
        return False
    return expected(query, key, value) and TORCH_FORWARD in _operators(node)


def _operators(node: Node) -> list[Any]:
    """Return the operators that torch runs for the attention call `node`, on fake tensors."""
    recorder = _Recorder()
    args: Any
    kwargs: Any
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    mode: Any = getattr(example(node), "fake_mode", None)
    assert mode is not None, f"{node} carries no fake tensor"
    with mode, torch.no_grad(), recorder:
        _ATTENTION(*args, **kwargs)
    return recorder.operators


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **kwargs or {})
