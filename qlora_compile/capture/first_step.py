"""The first training step of a model: what it needs, and a warning after it of sites that could be
fused and are not."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol
from weakref import ref

from torch import nn


class UnfusedWarning(UserWarning):
    """Blocks in training left sites, which the fused op could compute, to stock code."""


class _Region(Protocol):
    sites: frozenset[str]
    kept: dict[str, str]

    def unfused(self) -> dict[str, str]: ...


class FirstStep:
    """Waits for the end of the first step of training.

    The step has ended when a region of the model is called in training for the second time: by then
    every region that takes part in a step has run. The second call may belong to the next step, to
    a checkpoint's recomputation, or to a block that the model uses twice.

    prepare: called with the model before the step. model, called: weak references, because every
    region has its model's FirstStep: with other references, whoever copies or keeps one block would
    copy or keep the whole model. A copy has no model until a `ModelLink` gives it one.
    """

    def __init__(self, prepare: Callable[[nn.Module], None]) -> None:
        self.prepare = prepare
        self.model: ref[nn.Module] | None = None
        self.called: dict[int, ref[_Region]] | None = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None, "called": {}}

    def begin(self, region: _Region) -> None:
        """Note that `region` is called in training; warn if it was called before."""
        if self.called is None:
            return
        model = None if self.model is None else self.model()
        if not self.called and model is not None:
            self.prepare(model)
        if id(region) not in self.called:
            self.called[id(region)] = ref(region)
            return
        ran = [each for found in self.called.values() if (each := found()) is not None]
        self.called = None
        self._warn(ran)

    def warn_of_replicas(self) -> None:
        """Warn that the model is trained by nn.DataParallel, once."""
        if self.called is not None:
            self.called = None
            message = (
                "nn.DataParallel runs copies of the model's blocks, uncompiled; start one process "
                "for each GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one GPU"
            )
            warnings.warn(message, UnfusedWarning, stacklevel=2)

    def _warn(self, regions: list[_Region]) -> None:
        reasons = Counter(
            why
            for region in regions
            for site, why in region.unfused().items()
            if site not in region.kept
        )
        if reasons:
            total = sum(len(region.sites - region.kept.keys()) for region in regions)
            listed = "; ".join(f"{count}: {why}" for why, count in reasons.most_common(3))
            message = (
                f"{reasons.total()} of {total} linears and weights of experts that could be fused "
                f"are not ({listed}); see each with qlora_compile.explain(model)"
            )
            warnings.warn(message, UnfusedWarning, stacklevel=2)


class ModelLink:
    """An attribute of a model that tells its FirstStep which model that is.

    It is copied and pickled with the model, and then links the copies to each other.
    """

    def __init__(self, model: nn.Module, first_step: FirstStep) -> None:
        self.__setstate__({"model": model, "first_step": first_step})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        state["first_step"].model = ref(state["model"])

    @classmethod
    def make(cls, model: nn.Module, first_step: FirstStep) -> None:
        setattr(model, _LINK, cls(model, first_step))


_LINK = "_qlora_compile_first_step"
