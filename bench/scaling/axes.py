"""The axes: along each, one size of the training step grows while all others stay."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.peers.settings import STACK, Setting
from bench.scaling.quantities import FIRST, PEAK, SAVED, STEP, TUNE, Quantity

BASE = Setting(STACK, 2, 256, layers=2, hidden=1024, rank=16)
SMALL = Setting(STACK, 2, 64, layers=2, hidden=512, rank=16)
"""Sizes at which depth shows in the first step, because steps themselves are quick."""


@dataclass(frozen=True)
class Axis:
    """One axis. size: what grows, a field of Setting. panels: what to fit, by panel of the plot."""

    name: str
    size: str
    settings: tuple[Setting, ...]
    panels: tuple[tuple[Quantity, ...], ...] = ((STEP,), (PEAK, SAVED))

    def x(self, setting: Setting) -> int:
        return getattr(setting, self.size)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return tuple(quantity for panel in self.panels for quantity in panel)

    @property
    def fixed(self) -> str:
        """What stays the same along the axis."""
        first = self.settings[0]
        parts = parts_of(first)
        del parts[self.size]
        if self.size == "tokens":  # The length is what makes more of them.
            parts = {"batch_size": f"{first.batch_size} sequences", **parts}
        return ", ".join(parts.values())


def parts_of(setting: Setting) -> dict[str, str]:
    """Return every size in words, by its name in Setting."""
    return {
        "tokens": f"{setting.batch_size} x {setting.length} tokens",
        "layers": f"{setting.layers} layers",
        "hidden": f"hidden {setting.hidden}",
        "rank": f"rank {setting.rank}",
    }


TOKENS = Axis("tokens", "tokens", tuple(replace(BASE, length=n) for n in (64, 128, 256, 512, 1024)))
RANK = Axis("rank", "rank", tuple(replace(BASE, rank=n) for n in (4, 16, 64, 128)))
DEPTH = Axis("depth", "layers", tuple(replace(BASE, layers=n) for n in (2, 4, 8, 16)))
WIDTH = Axis("width", "hidden", tuple(replace(BASE, hidden=n) for n in (256, 512, 1024, 2048)))
FIRST_STEP = Axis(
    *("first step", "layers", tuple(replace(SMALL, layers=n) for n in (2, 8, 16, 32, 64))),
    panels=((FIRST,), (TUNE,)),
)
AXES = {axis.name: axis for axis in (TOKENS, RANK, DEPTH, WIDTH, FIRST_STEP)}

COMPILED_LAYERS = (2, 8)
"""The depths of FIRST_STEP at which stock under torch.compile is measured too, if asked for. It
compiles every layer anew, so that deeper models would take longer than everything else."""
