"""The Dynamo backend: rewrite the captured graph, then AOTAutograd and Inductor."""

from __future__ import annotations

import copy
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.compiler.config as compiler_config
from torch import Tensor, nn
from torch.fx import GraphModule

from qlora_compile.code_cache import cache_key_tag
from qlora_compile.kernels import attention, linear_call, op
from qlora_compile.kernels.cpu.toolchain import choose_instructions
from qlora_compile.kernels.experts import op as experts_op
from qlora_compile.kernels.selection import current_source, keeps_low_rank
from qlora_compile.passes.context import FusedExperts, FusedSite, PassContext, tensor_names
from qlora_compile.pipeline import run_pipeline
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.verification import captured_inputs
from qlora_compile.verifier import Verifier


class RunningRegion(Protocol):
    """What the backend reads of the region whose call is being compiled."""

    module: nn.Module
    sites: frozenset[str]
    kept: dict[str, str]


@dataclass(eq=False)
class RegionGraph:
    """One compiled graph and what became of its sites; calling it runs it. places: of each site the
    argument that is its weight."""

    fused: dict[str, FusedSite]
    experts: dict[str, FusedExperts]
    unfused: dict[str, str]
    places: dict[str, int]
    run: Callable[..., Any]
    original: GraphModule | None = None
    check: Callable[[Sequence[Any]], str | None] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.original is not None and self.check is not None:
            mismatch = self.check(args)
            if mismatch is not None:
                self.run = self.original
                self.unfused |= dict.fromkeys(self.fused, mismatch)
                self.fused = {}
            self.original = self.check = None
        _running[-1][1].append((self, [id(args[place]) for place in self.places.values()]))
        return self.run(*args)


GraphCall = tuple[RegionGraph, list[int]]
"""A graph that ran, and the `id` of the weight of each of its `places`."""

_running: list[tuple[RunningRegion, list[GraphCall]]] = []


@contextmanager
def running(region: RunningRegion) -> Iterator[list[GraphCall]]:
    """Names the region whose call follows; yields the graphs that call runs."""
    executed: list[GraphCall] = []
    _running.append((region, executed))
    try:
        yield executed
    finally:
        _running.pop()


def compile_inner(
    graph_module: GraphModule, example_inputs: list[Any], baked: Sequence[object] = ()
) -> Callable[..., Any]:
    """AOTAutograd and Inductor; baked: what else the result depends on."""
    from torch._functorch import config as partitioner_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.utils import get_donated_idxs

    on_cpu = any(isinstance(e, Tensor) and e.device.type == "cpu" for e in example_inputs)
    if on_cpu:
        choose_instructions()
    tag = cache_key_tag(_sources_digest(), *baked, on_cpu=on_cpu)

    def compile_half(graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        # AOTAutograd shares this list with what it checks in every backward. Code that takes what
        # was kept for the backward as memory of its own could run once only.
        (get_donated_idxs() or []).clear()
        with compiler_config.patch(cache_key_tag=tag):  # pyright: ignore[reportAttributeAccessIssue]
            return compile_fx_inner(graph, inputs, **options)

    # The backward is compiled when it first runs, long after the `with` below: what matters to it
    # has to be set in `compile_half` or by `config_patches`.
    # An op's input that elementwise code made, as SwiGLU and norms do, is made again for the
    # backward instead of kept: torch would keep it, as that writes less. Checks of every tensor's
    # strides, of which there are a dozen for each Linear, take a hundredth of a small model's step.
    with (
        compiler_config.patch(cache_key_tag=tag),  # pyright: ignore[reportAttributeAccessIssue]
        # Donated buffers are asked for only to have the list.
        partitioner_config.patch(ban_recompute_materialized_backward=False, donated_buffer=True),
    ):
        compiled = compile_fx(
            graph_module, example_inputs, compile_half, config_patches={"size_asserts": False}
        )
    assert callable(compiled)
    return compiled


@functools.cache
def _sources_digest() -> str:
    """Of what decides about compiled code: what our ops become and save, and how it is compiled."""
    modules = (op, linear_call, attention, experts_op, sys.modules[__name__])
    sources = [Path(str(module.__file__)).read_bytes() for module in modules]
    return hashlib.sha256(b"".join(sources)).hexdigest()


def make_backend(
    *, inductor: bool, verifier: Verifier | None, tuner: Tuner | None
) -> Callable[..., RegionGraph]:
    """A backend for torch.compile that rewrites the running region's graph; without `inductor` the
    rewritten graph runs as it is, which is enough to see what becomes of each site. The `tuner`
    sees to the graph's problems first, the `verifier` to the graph on its first call."""

    def qlora_compile_backend(
        graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> RegionGraph:
        region = _running[-1][0]
        checked = verifier if inductor else None
        original = copy.deepcopy(graph_module) if checked is not None else None
        inputs = captured_inputs(graph_module) if checked is not None else []
        context = PassContext(region.sites, dict(region.kept), tensors=tensor_names(region.module))
        places = _places(graph_module, context)
        run_pipeline(graph_module, context)
        check = None
        if checked is not None and original is not None:
            rewritten = copy.deepcopy(graph_module)
            fused = (*context.fused.values(), *context.experts.values())
            check = checked.checks(original, rewritten, inputs, fused, current_source())
        run: Callable[..., Any] = graph_module.forward
        if inductor:
            sites = context.fused.values()
            if tuner is not None:
                tuner.ensure_calls((site.forward, site.trains) for site in sites)
            if graph_module.graph.find_nodes(op="call_function", target=attention.ATTENTION):
                attention.start()
            source = current_source()
            keeping = [s.trains and keeps_low_rank(s.forward, source) for s in sites]
            run = compile_inner(graph_module, list(example_inputs), [source, keeping])
        told = (context.fused, context.experts, context.unfused, places)
        return RegionGraph(*told, run, original, check)

    return qlora_compile_backend


def _places(graph_module: GraphModule, context: PassContext) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        site = context.site_of(node) or context.experts_site_of(node)
        if site is not None:
            found.setdefault(site, place)
    return found
