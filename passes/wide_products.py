"""Has products of 16 bits computed in float32 on a CPU without instructions for them.

torch's products are plain loops there, and those of gradients take up to 400 times as long. Unlike
the passes over captured graphs, this one takes what AOTAutograd makes of them: the forward and the
backward in aten's operators, with every product that no fused op computes, such as a router's.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qlora_compile.kernels.cpu.instructions import multiplies
from qlora_compile.kernels.gpu.target import target_of

_aten = torch.ops.aten
PRODUCTS = (
    *(_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default),
    *(_aten.convolution.default, _aten.convolution_backward.default),
)
_CAST = torch.ops.prims.convert_element_type.default


def widen_products(graph_module: GraphModule) -> int:
    """Rewrite a graph of aten's operators in place; return the number of products in float32."""
    graph = graph_module.graph
    slow = [node for node in graph.nodes if node.target in PRODUCTS and _is_slow(node)]
    for node in slow:
        with graph.inserting_before(node):
            node.args = tuple(
                _cast(each, torch.float32) if isinstance(each, Node) else each for each in node.args
            )
        value = node.meta["val"]
        # The gradients of a convolution are several results.
        results = [node] if isinstance(value, Tensor) else list(node.users)
        for result in results:
            _narrow_again(result)
        if not isinstance(value, Tensor):
            node.meta["val"] = tuple(
                None if each is None else each.to(torch.float32) for each in value
            )
    if slow:
        graph_module.recompile()
    return len(slow)


def _is_slow(product: Node) -> bool:
    """Whether torch computes the product by loops."""
    value = product.meta["val"]
    first = value if isinstance(value, Tensor) else next(each for each in value if each is not None)
    is_cpu = first.device.type == "cpu" and target_of("cpu") is None
    plain = all(user.target is operator.getitem for user in product.users)
    return is_cpu and not multiplies(first.dtype) and (first is value or plain)


def _cast(operand: Node, dtype: torch.dtype) -> Node:
    cast = operand.graph.call_function(_CAST, (operand, dtype))
    cast.meta["val"] = operand.meta["val"].to(dtype)
    return cast


def _narrow_again(result: Node) -> None:
    """Have the users of a result that is now in float32 read it in its dtype of before."""
    value = result.meta["val"]
    with result.graph.inserting_after(result):
        narrow = result.graph.call_function(_CAST, (result, value.dtype))
    narrow.meta["val"] = value
    result.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
    result.meta["val"] = value.to(torch.float32)
