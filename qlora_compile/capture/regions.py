"""Regions: blocks of a model that are compiled in place, each kind of block once.

A region replaces its module's `forward` on the instance, or the one that accelerate's hook calls
there. Parameters, state-dict keys, classes and hooks stay as they are. Regions are copied and
pickled with the model, and then compile again on their first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils.hooks import RemovableHandle

import qlora_compile.hf.experts  # noqa: F401  registers the implementation a pickled model names
from qlora_compile.capture.backend import GraphCall, RegionGraph, Running
from qlora_compile.capture.context_parallel import refuse_context_parallel
from qlora_compile.capture.dynamo_settings import DynamoSettings
from qlora_compile.capture.first_block import with_gradient
from qlora_compile.capture.first_step import FirstStep
from qlora_compile.capture.hook_watch import HookWatch
from qlora_compile.capture.hooked_run import REFUSALS, HookedRun, obstacle, untraced
from qlora_compile.capture.hooks import FORWARD, Hook, hooks_inside
from qlora_compile.capture.placement import REGION, place, take_off
from qlora_compile.capture.region_kind import RegionKind
from qlora_compile.capture.zero import gather_apart, gather_whole
from qlora_compile.errors import StrictError
from qlora_compile.hf.adapters_by_row import is_given_by_row
from qlora_compile.hf.blocks import checkpoints, is_cached_call
from qlora_compile.hf.captured_outputs import append_collected
from qlora_compile.hf.replaced_forward import (
    CompiledForward,
    place_hooks,
    reached,
    replaced_forward,
)
from qlora_compile.hf.slotted_adapters import SlottedAdapters
from qlora_compile.kernels.cpu.slow_products import is_slow
from qlora_compile.kernels.plans import native as plans
from qlora_compile.kernels.selector import MODELLED
from qlora_compile.passes.context import (
    FusedExperts,
    FusedSite,
    experts_site,
    linear_site,
    tensor_names,
)

_OUTER_COMPILE = (
    "qlora_compile compiles this block, so a torch.compile around the model breaks its graph here; "
    "call that torch.compile without fullgraph=True"
)
_GIVEN_UP = "its block ran uncompiled, because Dynamo gave up on it"
_TRANSFORMED = "its block ran uncompiled, under a transform of torch.func"
_BY_ROW = "its block ran uncompiled: each row was given its adapter (adapter_names, or aLoRA)"


@dataclass(frozen=True)
class RegionSites:
    """The sites of a region by their names inside its module.

    kept: those to leave alone, with the reason. left: why the one site of a plain layer is left to
    torch in calls where torch is not slow; None to fuse it in every call.
    """

    sites: frozenset[str]
    kept: dict[str, str]
    left: str | None = None


class Region(CompiledForward):
    """The forward of one compiled module.

    planned, sites, kept: as in RegionSites. idle: whether no other site is left. graphs: as
    `_named_graphs` returns those of the last call; empty if that call ran uncompiled, for the
    reason `uncompiled`; None before the first call. cached: whether a call had a key-value cache.
    captured: the keys of inner outputs that the last forward collected.
    """

    def __init__(self, module: nn.Module, kind: RegionKind, planned: RegionSites) -> None:
        self.module = module
        self.kind = kind
        self.planned = planned
        self.sites = sites = planned.sites
        self.kept = kept = planned.kept
        self.idle = sites <= kept.keys()
        self.graphs: list[tuple[RegionGraph, dict[str, str]]] | None = None
        self.cached = False
        self.captured: tuple[str, ...] | None = None
        self.uncompiled = _GIVEN_UP
        self.first_step: FirstStep | None = None
        self.gathered: RemovableHandle | None = None
        self.adapters = SlottedAdapters(module, sites)
        self.watch = HookWatch(module)
        self.replaced = replaced_forward(module)
        self.__signature__ = inspect.signature(self.stock)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graphs": None}

    @property
    def __name__(self) -> str:
        return "forward"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.planned.left is not None:
            if torch.compiler.is_compiling():
                return self.stock(*args, **kwargs)
            if not any(map(is_slow, (*args, *kwargs.values()))):
                self.graphs, self.uncompiled = [], self.planned.left
                return self.stock(*args, **kwargs)
        # A key-value cache changes shape at every token, so a block that sees one would recompile
        # until Dynamo gives up. Nothing is gained without a site to fuse, or without any rows, as
        # in a head whose logits are not wanted. An exported program has no use for our ops.
        empty = len(args) > 0 and isinstance(args[0], Tensor) and args[0].numel() == 0
        cached = is_cached_call(args, kwargs)
        self.cached |= cached
        training = self.module.training and not (self.kind.probing or torch.compiler.is_compiling())
        if training and self.first_step is not None:
            self.first_step.begin(self)
        # Not is_exporting(), which is true of every compilation in torch 2.11.
        if self.idle or empty or cached or torch.compiler._is_exporting_flag:
            return self.stock(*args, **kwargs)
        if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:
            return self._outside_outer_graph(*args, **kwargs)
        return self._in_own_graphs(*args, **kwargs)

    @torch.compiler.disable(reason=_OUTER_COMPILE)
    def _outside_outer_graph(self, *args: Any, **kwargs: Any) -> Any:
        """As `_in_own_graphs`, while a torch.compile traces the model."""
        return self._in_own_graphs(*args, **kwargs)

    def _in_own_graphs(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if torch._C._are_functorch_transforms_active():
            self.graphs, self.uncompiled = [], _TRANSFORMED
            return self.stock(*args, **kwargs)
        hooks = self._hooks()
        if is_given_by_row((hook.function for hook in hooks), kwargs):
            self.graphs, self.uncompiled = [], _BY_ROW
            return self.stock(*args, **kwargs)
        if (reason := obstacle(module, hooks)) is not None:
            self.leave_uncompiled(reason)
            return self.stock(*args, **kwargs)
        hooked = self._hooked(hooks) if hooks else None
        watched = hooked is not None and hooked.is_watched
        stand_in = None
        # Hooks may check which values require a gradient, so none is added for them.
        if self.kind.repeated and module.training and torch.is_grad_enabled() and not watched:
            args, kwargs, stand_in = with_gradient(module, args, kwargs)
        if checkpoints(module):
            # The region is inside the checkpoint, so that recomputation runs compiled too.
            checkpoint: Any = module._gradient_checkpointing_func
            result = checkpoint(partial(self._run, hooked, **kwargs), *args)
        else:
            result = self._run(hooked, *args, **kwargs)
        return result if stand_in is None else stand_in.write_back(result)

    def _run(self, hooked: HookedRun | None, /, *args: Any, **kwargs: Any) -> Any:
        if hooked in self.kind.refused:
            self.leave_uncompiled(self.kind.refused[hooked])
            return (self.replaced or partial(self.kind.forward, self.module))(*args, **kwargs)
        refuse_context_parallel()
        tuner = self.kind.tuner
        if tuner is not None and not self.kind.probing:
            tuner.ensure_missed()
        plans.heed()
        # Here, because a checkpoint recomputes the block with the adapters of that moment. Slots
        # only read the weights of an adapter's modules; their hooks run in PEFT's forward.
        self.adapters.refresh(by_slots=hooked is None or not hooked.is_watched)
        with Running(self) as executed, DynamoSettings(hooked.settings if hooked else {}):
            try:
                result = self.kind.compiled(hooked)(self.replaced or self.module, *args, **kwargs)
            except REFUSALS:
                if hooked is None or not hooked.whole or executed:
                    raise
                self.kind.refused[hooked] = untraced(self._hooks())
                return self._run(hooked, *args, **kwargs)
        self.uncompiled = _GIVEN_UP
        if self.graphs is None or [g for g, _ in executed] != [g for g, _ in self.graphs]:
            self.graphs = self._named_graphs(executed)
            if self.kind.strict:
                self.raise_unfused()
        if hooked is not None and hooked.captured is not None:
            result, collected = result
            append_collected(collected)
        return result

    @property
    def stock(self) -> Callable[..., Any]:
        """The module's forward before there was a region."""
        return self.replaced or partial(self.kind.module_class.forward, self.module)

    def _hooks(self) -> tuple[Hook, ...]:
        hooks: tuple[Hook, ...] = ()
        if not self.watch.is_quiet():
            self.adapters.forget()
            if self.watch.has_hooks():
                place_hooks(self.module)
                hooks = hooks_inside(self.module)
        return hooks if self.replaced is None else (Hook(FORWARD, "", self.replaced), *hooks)

    def _hooked(self, hooks: tuple[Hook, ...]) -> HookedRun:
        hooked = HookedRun.of(self.module, hooks)
        if torch._C._current_graph_task_id() != -1:
            # In the backward a checkpoint recomputes the block, by the forward's graph.
            return replace(hooked, captured=self.captured)
        self.captured = hooked.captured
        return hooked

    def leave_uncompiled(self, reason: str) -> None:
        """Report that a call runs uncompiled; raise StrictError if that is refused."""
        self.graphs, self.uncompiled = [], reason
        if self.kind.strict:
            self.raise_unfused()

    def _named_graphs(self, executed: list[GraphCall]) -> list[tuple[RegionGraph, dict[str, str]]]:
        """Return the graphs that ran, each with a map from its site names to this module's names
        where they differ. A part of a split block may have been compiled for another module of the
        same kind; the weights it was given show which sites it computes here."""
        if len(executed) == 1:
            return [(executed[0][0], {})]
        tensors = tensor_names(self.module)
        graphs = []
        for graph, weights in executed:
            names: dict[str, str] = {}
            for site, weight in zip(graph.weights, weights, strict=True):
                found = tensors.get(weight, ())
                sites = {s for n in found for s in (linear_site(n), experts_site(n))}
                if site not in sites:
                    names[site] = min(sites & self.sites, default=site)
            graphs.append((graph, names))
        return graphs

    @property
    def records_name(self) -> str:
        """The name of the selector that the graphs of the last call ask for variants."""
        return next((graph.records_name for graph, _ in self.graphs or ()), MODELLED)

    def raise_unfused(self) -> None:
        """Raise StrictError if the last call did not fuse a site that is not among `kept`."""
        missing = {site: why for site, why in self.unfused().items() if site not in self.kept}
        if missing:
            reasons = "\n".join(f"  {site}: {why}" for site, why in sorted(missing.items()))
            raise StrictError(count=len(missing), reasons=reasons)

    @property
    def displaced(self) -> str | None:
        """Why the module's calls no longer run through this region, None if they do."""
        if any(each is self for each in reached(self.module)):
            return None
        hook = Hook(FORWARD, "", self.module.forward)
        return f"its block runs uncompiled, because {hook} has replaced the compiled forward"

    def fused(self) -> dict[str, FusedSite]:
        """Return the Linears that the last call computed by a fused op."""
        return self._by_own_names("fused")

    def experts(self) -> dict[str, FusedExperts]:
        """Return the weights of experts that the last call computed by the experts' op."""
        return self._by_own_names("experts")

    def _by_own_names(self, attribute: str) -> dict[str, Any]:
        """Join one `attribute` of the last call's graphs, by this module's names of the sites."""
        found: dict[str, Any] = {}
        for graph, names in () if self.displaced else self.graphs or ():
            for site, value in getattr(graph, attribute).items():
                found[str(names.get(site, site))] = value
        return found

    def unfused(self) -> dict[str, str]:
        """Return the sites that the last call did not fuse, each with the reason."""
        if (displaced := self.displaced) is not None:
            return dict.fromkeys(self.sites, displaced) | self.kept
        if self.graphs is None:
            reason = "its block has not run yet"
            if self.cached:
                reason = "its block has run with a key-value cache only, uncompiled"
            return dict.fromkeys(self.sites, reason) | self.kept
        if not self.graphs:
            return dict.fromkeys(self.sites, self.uncompiled) | self.kept
        broken = f"graph breaks split its block into {len(self.graphs)} graphs"
        missing = broken if len(self.graphs) > 1 else "not used in the last call"
        served = self.fused().keys() | self.experts().keys()
        return dict.fromkeys(self.sites - served, missing) | self._by_own_names("unfused")


def install(module: nn.Module, kind: RegionKind, planned: RegionSites) -> Region:
    region = Region(module, kind, planned)
    if kind.repeated:
        region.gathered = gather_whole(module)
    place(region)
    return region


def uninstall(module: nn.Module) -> None:
    """Give `module` back its earlier forward, unless somebody has replaced the region's since."""
    region = take_off(module)
    if region.gathered is not None:
        gather_apart(module, region.gathered)


def reinstall(region: Region) -> None:
    """Put a region like `region`, which has been uninstalled, in its place again."""
    install(region.module, region.kind, region.planned).first_step = region.first_step


def region_of(module: nn.Module) -> Region | None:
    return module.__dict__.get(REGION)
