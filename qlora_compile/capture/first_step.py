"""The first training step of a model: what it needs, and a warning after it of sites that could be
fused and are not."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, Protocol


class UnfusedWarning(UserWarning):
    """Blocks in training left sites, which the fused op could compute, to stock code."""


class _Region(Protocol):
    sites: frozenset[str]
    kept: dict[str, str]

    def unfused(self) -> dict[str, str]: ...


class FirstStep:
    """Waits for the end of the first step of training.

    The step has ended when one of the `regions` of a model is called in training for the second
    time: by then every region that takes part in a step has run. The second call may belong to the
    next step, to a checkpoint's recomputation, or to a block that the model uses twice.

    prepare: called before the step.
    """

    def __init__(self, regions: Collection[_Region], prepare: Callable[[], None]) -> None:
        self.regions, self.prepare = regions, prepare
        self.called: set[int] | None = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"called": set()}

    def begin(self, region: _Region) -> None:
        """Note that `region` is called in training; warn if it was called before."""
        if self.called is None:
            return
        if not self.called:
            self.prepare()
        if id(region) not in self.called:
            self.called.add(id(region))
            return
        ran = [each for each in self.regions if id(each) in self.called]
        self.called = None
        self._warn(ran)

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
