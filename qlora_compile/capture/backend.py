"""The Dynamo backend: rewrites, tunes, verifies and compiles each captured graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.fx import GraphModule

from qlora_compile.capture.inductor import compile_inner
from qlora_compile.capture.pipeline import run_pipeline, settle_calls
from qlora_compile.hf.own_graphs import CALLS
from qlora_compile.kernels.selector import ModelledSelector
from qlora_compile.passes.context import FusedExperts, FusedSite, PassContext, tensor_names
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.verify.check import captured_inputs
from qlora_compile.verify.graph_forms import drops_out, fused_masks, with_masks
from qlora_compile.verify.verifier import Verifier


class RunningRegion(Protocol):
    """The part of a region that the backend reads while it compiles a call of the region."""

    module: nn.Module
    sites: frozenset[str]
    kept: dict[str, str]


@dataclass(eq=False)
class RegionGraph:
    """One compiled graph, which is run by calling it, and what became of its sites.

    fused, experts, unfused: as in PassContext. weights: for each site, the position of its weight
    among the graph's arguments. records_name: the name of the selector that the graph's calls ask
    for their variants. unchecked: the captured graph and the check that compares it with this one
    on real inputs; None once the first call has run the check, or if there is none.
    """

    fused: dict[str, FusedSite]
    experts: dict[str, FusedExperts]
    unfused: dict[str, str]
    weights: dict[str, int]
    records_name: str
    run: Callable[..., Any]
    unchecked: tuple[GraphModule, Callable[[Sequence[Any]], str | None]] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.unchecked is not None:
            captured, check = self.unchecked
            mismatch = check(args)
            if mismatch is not None:
                self.run = captured
                self.unfused |= dict.fromkeys(self.fused, mismatch)
                self.fused = {}
            self.unchecked = None
        _, executed = CALLS.stack[-1]
        executed.append((self, [id(args[position]) for position in self.weights.values()]))
        return self.run(*args)


GraphCall = tuple[RegionGraph, list[int]]
"""A graph that ran, and the `id` of each argument listed in its `weights`."""


class Running:
    """Makes `region` the running one of this thread inside a `with`, which yields a list that the
    region's call fills with graphs. The backend learns from this which region it compiles for."""

    def __init__(self, region: RunningRegion) -> None:
        self._region = region

    def __enter__(self) -> list[GraphCall]:
        executed: list[GraphCall] = []
        CALLS.stack.append((self._region, executed))
        return executed

    def __exit__(self, *_: object) -> None:
        CALLS.stack.pop()


def running_region() -> RunningRegion:
    """Return the innermost region whose call this thread is in."""
    region, _ = CALLS.stack[-1]
    return region


def make_backend(
    *, inductor: bool, verifier: Verifier | None, tuner: Tuner | None
) -> Callable[..., RegionGraph]:
    """Make a backend for torch.compile that rewrites the graphs of the running region.

    inductor: whether to compile the rewritten graph; if not, it is interpreted, which is enough to
    see what becomes of each site. tuner: finds or measures the graph's variants; None leaves the
    choice to the cost model. verifier: checks the graph on its first call; None checks nothing.
    """
    selector = ModelledSelector() if tuner is None else tuner.selector
    verifier = verifier if inductor else None

    def qlora_compile_backend(
        graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> RegionGraph:
        region = running_region()
        names = tensor_names(region.module)
        inputs = [] if verifier is None else captured_inputs(graph_module, names)
        captured = graph_module if verifier is None else copy.deepcopy(graph_module)
        graph = _rewrite(graph_module, region, names, selector)
        if inductor:
            _tune(graph_module, graph, selector, tuner)
            compiled, rewritten = None, graph_module
            if verifier is not None:
                rewritten = copy.deepcopy(graph_module)
                # Compiled code draws other masks than the graph, so for a graph with dropout a copy
                # with fixed masks is compiled and checked instead.
                if drops_out(rewritten):
                    masked = with_masks(rewritten, fused_masks(rewritten))
                    compiled = compile_inner(masked, list(example_inputs))
            graph.run = compile_inner(graph_module, list(example_inputs))
            if verifier is not None:
                graphs = captured, rewritten, compiled or graph.run
                fused = (*graph.fused.values(), *graph.experts.values())
                graph.unchecked = captured, verifier.checks(*graphs, inputs, fused, selector)
        return graph

    return qlora_compile_backend


def _rewrite(
    graph_module: GraphModule,
    region: RunningRegion,
    names: Mapping[int, Sequence[str]],
    selector: ModelledSelector,
) -> RegionGraph:
    """Run the passes and return the rewritten graph, which is not compiled.

    names: the names of the region's parameters and buffers, by `id`.
    """
    context = PassContext(region.sites, dict(region.kept), tensors=names)
    weights: dict[str, int] = {}
    for position, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        site = context.site_of(node) or context.experts_site_of(node)
        if site is not None:
            weights.setdefault(site, position)
    run_pipeline(graph_module, context)
    outcomes = (context.fused, context.experts, context.unfused)
    return RegionGraph(*outcomes, weights, selector.name, graph_module.forward)


def _tune(
    graph_module: GraphModule, graph: RegionGraph, selector: ModelledSelector, tuner: Tuner | None
) -> None:
    """Find or measure variants for the graph's calls, and write the selector's name into them."""
    if tuner is not None:
        tuner.ensure_calls((site.forward, site.trains) for site in graph.fused.values())
    settle_calls(graph_module, selector)
