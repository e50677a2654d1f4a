"""Has products of 16 bits computed in float32 on a CPU without instructions for them.

torch's products are plain loops there, and those of gradients take up to 400 times as long. Unlike
the passes over captured graphs, this one takes what AOTAutograd makes of them: the forward and the
backward in aten's operators, with every product that no fused op computes, such as a router's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten = torch.ops.aten
PRODUCTS = (
    *(_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default),
    *(_aten.convolution.default, _aten.convolution_backward.default),
)
_CAST = torch.ops.prims.convert_element_type.default


def widen_products(graph_module: GraphModule, is_slow: Callable[[Tensor], bool]) -> int:
    """Rewrite a graph of aten's operators in place; return the number of products in float32.

    is_slow: whether torch computes a product with this result by loops.
    """
    products = (node for node in graph_module.graph.nodes if node.target in PRODUCTS)
    slow = [node for node in products if any(is_slow(each.meta["val"]) for each in _results(node))]
    for node in slow:
        with node.graph.inserting_before(node):
            node.args = tuple(
                _cast(each, torch.float32) if isinstance(each, Node) else each for each in node.args
            )
        results = _results(node)
        for result in results:
            _narrow_again(result)
        if node not in results:
            node.meta["val"] = tuple(
                None if each is None else each.to(torch.float32) for each in node.meta["val"]
            )
    if slow:
        graph_module.recompile()
    return len(slow)


def _results(product: Node) -> list[Node]:
    """Return the nodes of the tensors that a product makes: itself, or those that take one of the
    gradients of a convolution."""
    return [product] if isinstance(product.meta["val"], Tensor) else list(product.users)


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
