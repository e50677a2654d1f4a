"""The report: for every Linear of a model, what was done with it or why it was left alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from qlora_compile.hf import adapters
from qlora_compile.hf.blocks import kept_linears
from qlora_compile.quantized_linear import QuantizedLinear
from qlora_compile.regions import Region, region_of


@dataclass(frozen=True)
class Site:
    """One Linear: weight [n, k] stored in `format` (its dtype where it is not quantised), with an
    adapter of `rank` (0: none). `variant` computes it if it is `fused`, else `reason` says why not.
    """

    name: str
    fused: bool
    variant: str | None
    format: str
    n: int
    k: int
    rank: int
    reason: str | None


@dataclass(frozen=True)
class Report:
    """Every Linear of the model exactly once, in the model's order."""

    sites: tuple[Site, ...]

    @property
    def fused(self) -> int:
        """How many sites are fused."""
        return sum(site.fused for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        return {
            "fused": self.fused,
            "total": len(self.sites),
            "sites": [asdict(site) for site in self.sites],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        header = ("site", "fused", "variant", "format", "N", "K", "rank", "reason")
        rows = [
            (s.name, "yes" if s.fused else "no", s.variant, s.format, s.n, s.k, s.rank, s.reason)
            for s in self.sites
        ]
        cells = [header, *(tuple("-" if c is None else str(c) for c in row) for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        left = Counter(site.reason for site in self.sites if not site.fused)
        summary = [f"{self.fused} of {len(self.sites)} linears fused"]
        summary += [f"{count} left: {reason}" for reason, count in left.most_common()]
        return "\n".join([*lines, "", *summary])


def build_report(model: nn.Module) -> Report:
    """Reads the regions' last calls; sites no region has run yet say so."""
    kept = kept_linears(model) | adapters.trained_copies(model)
    regions = {
        name: region
        for name, module in model.named_modules()
        if (region := region_of(module)) is not None
    }
    sites = []
    for name, linear in adapters.linear_sites(model).items():
        found = _enclosing(name, regions)
        format = _format(linear)
        n, k = linear.out_features, linear.in_features
        rank = adapters.active_rank(model, name)
        fused = None
        if found is None:
            reason = kept.get(name, "outside the blocks, and neither quantised nor adapted")
        else:
            prefix, region = found
            local = name[len(prefix) :].lstrip(".")
            fused = region.fused().get(local)
            reason = None if fused else region.unfused().get(local, "the block has not run yet")
        variant = fused.variant if fused else None
        sites.append(Site(name, fused is not None, variant, format, n, k, rank, reason))
    return Report(tuple(sites))


def _enclosing(name: str, regions: dict[str, Region]) -> tuple[str, Region] | None:
    """The innermost region that lists the site `name`, with the region's own name."""
    best = None
    for prefix, region in regions.items():
        inside = not prefix or name == prefix or name.startswith(f"{prefix}.")
        if inside and name[len(prefix) :].lstrip(".") in region.sites:
            best = (prefix, region)
    return best


def _format(linear: nn.Linear) -> str:
    if isinstance(linear, QuantizedLinear):
        return linear.format
    state = getattr(linear.weight, "quant_state", None)
    if state is not None:
        return state.quant_type
    if str(linear.weight.dtype) == "torch.int8":
        return "int8"
    return str(linear.weight.dtype).removeprefix("torch.")
