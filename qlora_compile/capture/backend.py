"""The Dynamo backend: rewrite the captured graph, then AOTAutograd and Inductor."""

from __future__ import annotations

import copy
import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.compiler.config as compiler_config
from torch import Tensor, nn
from torch.fx import GraphModule

from qlora_compile.capture.code_cache import cache_key_tag
from qlora_compile.capture.pipeline import run_pipeline, settle_calls
from qlora_compile.kernels import attention, linear_call, op
from qlora_compile.kernels.cpu.toolchain import choose_instructions
from qlora_compile.kernels.experts import op as experts_op
from qlora_compile.kernels.selector import ModelledSelector
from qlora_compile.passes.context import FusedExperts, FusedSite, PassContext, tensor_names
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.verify.check import captured_inputs
from qlora_compile.verify.verifier import Verifier


class RunningRegion(Protocol):
    """What the backend reads of the region whose call is being compiled."""

    module: nn.Module
    sites: frozenset[str]
    kept: dict[str, str]


@dataclass(eq=False)
class RegionGraph:
    """One compiled graph and what became of its sites; calling it runs it. weights: for each site,
    which argument is its weight. records_name: of the selector that its calls ask."""

    fused: dict[str, FusedSite]
    experts: dict[str, FusedExperts]
    unfused: dict[str, str]
    weights: dict[str, int]
    records_name: str
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
        _, executed = _running.regions[-1]
        executed.append((self, [id(args[position]) for position in self.weights.values()]))
        return self.run(*args)


GraphCall = tuple[RegionGraph, list[int]]
"""A graph that ran, and the `id` of each argument that its `weights` names."""


class _Running(threading.local):
    """The regions whose calls are under way in one thread, the innermost last: autograd's threads
    recompute checkpointed regions, several at a time."""

    def __init__(self) -> None:
        self.regions: list[tuple[RunningRegion, list[GraphCall]]] = []


_running = _Running()


@contextmanager
def running(region: RunningRegion) -> Iterator[list[GraphCall]]:
    """Names the region whose call follows in this thread; yields the graphs that the call runs."""
    executed: list[GraphCall] = []
    _running.regions.append((region, executed))
    try:
        yield executed
    finally:
        _running.regions.pop()


def compile_inner(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """AOTAutograd and Inductor."""
    from torch._functorch import config as partitioner_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.utils import get_donated_idxs

    on_cpu = any(isinstance(e, Tensor) and e.device.type == "cpu" for e in example_inputs)
    if on_cpu:
        choose_instructions()
    tag = cache_key_tag(_sources_digest(), on_cpu=on_cpu)

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
    """Makes a backend for torch.compile that rewrites the running region's graph.

    Without `inductor` the rewritten graph runs as it is, which is enough to see what becomes of
    each site. The `tuner` first gives the graph's problems their choices; without one the cost
    model chooses. The `verifier` checks the graph on its first call.
    """
    selector = ModelledSelector() if tuner is None else tuner.selector

    def qlora_compile_backend(
        graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> RegionGraph:
        region, _ = _running.regions[-1]
        checked = verifier if inductor else None
        original = copy.deepcopy(graph_module) if checked is not None else None
        names = tensor_names(region.module)
        inputs = captured_inputs(graph_module, names) if checked is not None else []
        context = PassContext(region.sites, dict(region.kept), tensors=names)
        weights = _weights(graph_module, context)
        run_pipeline(graph_module, context)
        check = None
        run: Callable[..., Any] = graph_module.forward
        if inductor:
            sites = context.fused.values()
            if tuner is not None:
                tuner.ensure_calls((site.forward, site.trains) for site in sites)
            settle_calls(graph_module, selector)
            if checked is not None and original is not None:
                rewritten = copy.deepcopy(graph_module)
                fused = (*sites, *context.experts.values())
                check = checked.checks(original, rewritten, inputs, fused, selector)
            if graph_module.graph.find_nodes(op="call_function", target=attention.ATTENTION):
                attention.start()
            run = compile_inner(graph_module, list(example_inputs))
        return RegionGraph(
            context.fused,
            context.experts,
            context.unfused,
            weights,
            selector.name,
            run,
            original,
            check,
        )

    return qlora_compile_backend


def _weights(graph_module: GraphModule, context: PassContext) -> dict[str, int]:
    """For each site, which of the graph's arguments is its weight."""
    found: dict[str, int] = {}
    for position, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        site = context.site_of(node) or context.experts_site_of(node)
        if site is not None:
            found.setdefault(site, position)
    return found
