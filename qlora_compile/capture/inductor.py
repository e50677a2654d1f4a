"""The last step of the backend: AOTAutograd and Inductor, set for our graphs."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.compiler.config as compiler_config
from torch import Tensor
from torch.fx import GraphModule

from qlora_compile.capture.code_cache import cache_key_tag
from qlora_compile.kernels import attention, library, linear_call, op
from qlora_compile.kernels.cpu import attention as cpu_attention
from qlora_compile.kernels.cpu import background, dropout, instructions, thin
from qlora_compile.kernels.cpu.slow_products import is_looped
from qlora_compile.kernels.cpu.toolchain import choose_instructions
from qlora_compile.kernels.cpu.torn_files import remove_torn_files
from qlora_compile.kernels.experts import op as experts_op
from qlora_compile.passes import wide_products
from qlora_compile.passes.nodes import example


def compile_inner(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile the rewritten graph by AOTAutograd and Inductor."""
    from torch._functorch import config as partitioner_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.utils import get_donated_idxs

    remove_torn_files()
    on_cpu = any(isinstance(e, Tensor) and e.device.type == "cpu" for e in example_inputs)
    if on_cpu:
        choose_instructions()
        fused = graph_module.graph.find_nodes(op="call_function", target=op.QLORA_LINEAR)
        inputs = [example(node.args[0]) for node in fused]
        dtypes = {each.dtype for each in inputs if each is not None}
        builds = [build for dtype in dtypes for build in thin.builds(dtype)]
        if any(node.args[2] is not None for node in fused):
            builds += dropout.builds()
        if graph_module.graph.find_nodes(op="call_function", target=attention.ATTENTION):
            builds += cpu_attention.builds(backward=False)
        background.start(builds, threads=1)
    level = instructions.level() if on_cpu else None
    tag = cache_key_tag(_sources_digest(), level, on_cpu=on_cpu)

    def compile_half(graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        # AOTAutograd shares this list with what it checks in every backward. Code that takes what
        # was kept for the backward as memory of its own could run once only.
        (get_donated_idxs() or []).clear()
        if graph.graph.find_nodes(op="call_function", target=attention.ATTENTION_BACKWARD):
            background.start(cpu_attention.builds(backward=True), threads=1)
        wide_products.widen_products(graph, is_looped)
        with compiler_config.patch(cache_key_tag=tag):  # pyright: ignore[reportAttributeAccessIssue]
            return compile_fx_inner(graph, inputs, **options)

    # The backward is compiled when it first runs, long after the `with` below: what matters to it
    # has to be set in `compile_half` or by `config_patches`.
    # An op's input that elementwise code made, as SwiGLU and norms do, is made again for the
    # backward instead of kept: torch would keep it, as that writes less.
    with (
        compiler_config.patch(cache_key_tag=tag),  # pyright: ignore[reportAttributeAccessIssue]
        # Donated buffers are asked for only to have the list.
        partitioner_config.patch(ban_recompute_materialized_backward=False, donated_buffer=True),
    ):
        compiled = compile_fx(graph_module, example_inputs, compile_half, config_patches=_SETTINGS)
    assert callable(compiled)
    return compiled


_SETTINGS = {
    # Checks of every tensor's strides, of which there are a dozen for each Linear, take a hundredth
    # of a small model's step.
    "size_asserts": False,
    # A C++ wrapper calls an op such as ours through Python, which takes half as long again, does
    # not escape the op's text, and in torch 2.13 ends the process by a segmentation fault.
    "cpp_wrapper": False,
    # None of our ops is lowered to torch's.
    "implicit_fallbacks": True,
}


@functools.cache
def _sources_digest() -> str:
    """Digest the sources that decide on compiled code: what our ops become and save, and how it is
    compiled."""
    modules = (
        *(library, op, linear_call, attention, experts_op, wide_products),
        sys.modules[__name__],
    )
    sources = [Path(str(module.__file__)).read_bytes() for module in modules]
    return hashlib.sha256(b"".join(sources)).hexdigest()
