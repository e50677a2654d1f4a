"""The registry of passes, in the order they run.

A pass is called with (graph_module, context), edits the graph, and returns its number of rewrites.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from qlora_compile.passes.attention import replace_attention
from qlora_compile.passes.canonicalize import drop_null_casts
from qlora_compile.passes.context import PassContext
from qlora_compile.passes.match import match_adapters, match_linears
from qlora_compile.passes.matmul import linearize_matmuls
from qlora_compile.passes.siblings import group_siblings

Pass = Callable[[GraphModule, PassContext], int]

PASSES: tuple[Pass, ...] = (
    drop_null_casts,
    linearize_matmuls,
    match_linears,
    match_adapters,
    group_siblings,
    replace_attention,
)
