"""Canonical form: removes casts that change nothing, so that later passes meet fewer patterns."""

from __future__ import annotations

from torch.fx import GraphModule

from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import example, is_cast


def drop_null_casts(graph_module: GraphModule, context: PassContext) -> int:
    """Rewrite x.to(dtype)  ⇒  x where x already has that dtype; return the number of rewrites."""
    dropped = 0
    for node in list(graph_module.graph.nodes):
        if not is_cast(node) or node.kwargs.get("copy") or True in node.args:
            continue
        before, after = example(node.args[0]), example(node)
        if before is not None and after is not None and before.dtype == after.dtype:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
            dropped += 1
    return dropped
