"""RegionKind: what the regions of one class of modules share, above all their compiled code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn

from qlora_compile.capture.backend import make_backend, running_region
from qlora_compile.capture.guards import kept_guards
from qlora_compile.capture.hooked_run import HookedRun
from qlora_compile.hf.blocks import own_forward
from qlora_compile.tuning.modes import tuner_of
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.verify.verifier import Verifier


@dataclass
class RegionKind:
    """Settings and compiled forward that the modules of one class in one model share. probing:
    whether calls are captured but not compiled. refused: hooks with which Dynamo refused to trace
    the block as one graph, and the reason."""

    module_class: type[nn.Module]
    strict: bool
    verifier: Verifier | None
    repeated: bool
    tune: str
    probing: bool = False
    refused: dict[HookedRun, str] = field(default_factory=dict, repr=False)
    _compiled: dict[tuple[bool, HookedRun | None], Callable[..., Any]] = field(
        default_factory=dict, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_compiled": {}, "refused": {}, "probing": False}
        state.pop("tuner", None)
        return state

    @functools.cached_property
    def tuner(self) -> Tuner | None:
        """The kind's tuner, the same while the kind lives: compiled calls name its selector."""
        return tuner_of(self.tune)

    @property
    def forward(self) -> Callable[..., Any]:
        return own_forward(self.module_class)

    def compiled(self, hooked: HookedRun | None) -> Callable[..., Any]:
        """Return a function of (module, *args, **kwargs): `forward` compiled, or while probing only
        rewritten.
        hooked: None if no module inside the block has hooks."""
        key = (self.probing, hooked)
        if key not in self._compiled:
            backend = make_backend(
                inductor=not self.probing,
                verifier=self.verifier,
                tuner=self.tuner,
            )
            forward = self.forward if hooked is None else hooked.prepared(self.forward)
            self._compiled[key] = torch.compile(
                _entry(forward),
                backend=backend,
                fullgraph=hooked is not None and hooked.whole,
                options={"guard_filter_fn": _kept},
            )
        return self._compiled[key]


def _kept(entries: Sequence[Any]) -> list[bool]:
    """Return `kept_guards` of the region whose call is compiled."""
    return kept_guards(running_region().module, entries)


def _entry(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with its own code object that calls `forward`: Dynamo counts recompilations
    per code object, so kinds and models do not share one limit."""

    def region(module, *args, **kwargs):
        return forward(module, *args, **kwargs)

    code = region.__code__.replace(co_name=f"region_{forward.__qualname__}")
    return FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)
