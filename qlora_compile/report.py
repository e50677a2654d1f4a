"""Report: for every Linear of a model, what computes it or why it was left alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qlora_compile.capture.regions import Region, region_of
from qlora_compile.chosen import Chosen
from qlora_compile.hf import adapters, expert_adapters, foreign, head_loss
from qlora_compile.hf.blocks import is_inside
from qlora_compile.hf.full_training import REASON as TRAINED_IN_FULL
from qlora_compile.kernels.plans import native as plans
from qlora_compile.kernels.selector import ModelledSelector, is_known, selector_named
from qlora_compile.passes.context import READ_PAST_THE_LAYER, FusedSite
from qlora_compile.sites import OUTSIDE, Inventory
from qlora_compile.text_table import text_table
from qlora_compile.verify.certificate import Certificate


@dataclass(frozen=True)
class Site:
    """One Linear, Conv1D or weight of experts, with a weight [n, k].

    format: how the weight is stored: its dtype if it is not quantised, another library's class if
    only that class reads it. rank: the adapter's, 0 for none. reason: why the site is not `fused`.
    forward, backward: what computes a fused site, and in training its gradients. keeps_low_rank:
    whether the forward keeps S = x Aᵀ for the backward.
    experts: how many matrices [n, k] a weight of experts holds, 0 for a Linear. origin: where a
    quantised weight comes from: "quantised here", another library's layer, or a checkpoint.
    """

    name: str
    fused: bool
    format: str
    n: int
    k: int
    rank: int
    reason: str | None
    forward: Chosen | None = None
    backward: Chosen | None = None
    keeps_low_rank: bool = False
    experts: int = 0
    origin: str | None = None

    @property
    def parameters(self) -> int:
        return max(self.experts, 1) * self.n * self.k

    @property
    def variant(self) -> str | None:
        """The name of the variant that computes the forward."""
        return self.forward.variant if self.forward else None


@dataclass(frozen=True)
class Report:
    """What became of a model's sites. `str()` of a report is a table, `to_json()` its JSON.

    sites: every Linear exactly once, in the model's order, then every weight of experts. others:
    other modules that PEFT adapts or trains, by name, each with the reason. certificates,
    mismatches: each graph that `optimize(verify=...)` has checked has one of the two.
    unknown_records: names of records that compiled calls ask for and that this process does not
    have; the cost model chooses for these calls. python_launches: on a GPU, why Python starts the
    kernels of some calls of this process, instead of a plan. loss: what computes the loss in
    training, if `logits_free_loss` was asked for or TRL's trainer has trained on a CPU.
    """

    sites: tuple[Site, ...]
    others: dict[str, str] = field(default_factory=dict)
    certificates: tuple[Certificate, ...] = ()
    mismatches: tuple[str, ...] = ()
    unknown_records: tuple[str, ...] = ()
    python_launches: tuple[str, ...] = ()
    loss: str | None = None

    @property
    def fused(self) -> int:
        """The number of fused sites."""
        return sum(site.fused for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        return {
            "fused": self.fused,
            "total": len(self.sites),
            "sites": [asdict(site) | {"parameters": site.parameters} for site in self.sites],
            "others": self.others,
            "certificates": [certificate.to_dict() for certificate in self.certificates],
            "mismatches": list(self.mismatches),
            "unknown_records": list(self.unknown_records),
            "loss": self.loss,
            "python_launches": list(self.python_launches),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        header = (
            *("site", "fused", "forward", "backward", "format", "origin", "N", "K", "rank"),
            "reason",
        )
        rows = [
            (
                *(s.name, "yes" if s.fused else "no"),
                *(c and c.variant for c in (s.forward, s.backward)),
                *(s.format, s.origin, f"{s.experts} x {s.n}" if s.experts else s.n),
                *(s.k, s.rank, s.reason),
            )
            for s in self.sites
        ]
        choices = self._choices()
        lines = [*text_table(header, rows), "", *choices, *([""] * bool(choices)), *self.summary()]
        return "\n".join(lines)

    def summary(self) -> list[str]:
        """Return lines with the number of fused sites, reasons for the others, and certificates."""
        left = Counter(site.reason for site in self.sites if not site.fused)
        linears = [site.fused for site in self.sites if not site.experts]
        weights = [site for site in self.sites if site.experts]
        summary = [f"{sum(linears)} of {len(linears)} linears fused"]
        if weights:
            fused, count = sum(s.fused for s in weights), sum(s.parameters for s in weights)
            summary.append(
                f"{fused} of {len(weights)} weights of experts fused, {count:,} parameters"
            )
        summary += [f"{count} left: {reason}" for reason, count in left.most_common()]
        summary += [f"{name} left to PEFT: {why}" for name, why in self.others.items()]
        summary += [
            f"this process has no records {name!r}: the cost model chooses for their calls"
            for name in self.unknown_records
        ]
        summary += self.python_launches
        summary += [f"loss: {self.loss}"] * (self.loss is not None)
        return [*summary, *map(str, self.certificates)]

    def _choices(self) -> list[str]:
        """Return a table with one line for each distinct choice; sites of one shape share one."""
        count: Counter[tuple[Any, ...]] = Counter()
        for site in self.sites:
            for direction in ("forward", "backward"):
                c: Chosen | None = getattr(site, direction)
                if c is not None:
                    shape = (direction, c.rows, c.n, site.k, c.rank, site.format)
                    count[(*shape, site.keeps_low_rank, c)] += 1
        header = (
            *("direction", "M", "N", "K", "rank", "format", "sites", "variant", "config", "S"),
            *("chosen by", "ms", "gain over dense", "runner-up"),
        )
        rows = [
            (
                *(*key[:6], sites),
                *(
                    c.variant,
                    c.config,
                    _kept(keeps, key[4]),
                ),
                *(_chooser(c), f"{c.seconds * 1e3:.3g}"),
                c.gain and f"{c.gain:.2f}x",
                c.runner_up and f"{c.runner_up}, {c.margin:.2f}x",
            )
            for (*key, keeps, c), sites in sorted(count.items(), key=lambda item: item[0][:6])
        ]
        return text_table(header, rows) if rows else []


def _chooser(chosen: Chosen) -> str:
    if chosen.measured:
        return "measurement"
    reason = chosen.unmeasured
    return "cost model" if reason is None else f"cost model, not measured: {reason}"


def _kept(keeps: bool, rank: str) -> str | None:
    if rank == "0":
        return None
    return "kept" if keeps else "recomputed"


def regions_of(inventory: Inventory) -> dict[str, Region]:
    """Return the regions of compiled modules, by the modules' names."""
    found = ((name, region_of(module)) for name, module in inventory.modules.items())
    return {name: region for name, region in found if region is not None}


def build_report(inventory: Inventory) -> Report:
    """Build a report from the last calls of all regions; sites that have not run yet say so."""
    regions = regions_of(inventory)
    sites = []
    for name, entry in inventory.linears.items():
        found = _enclosing(name, regions)
        n, k = foreign.sizes(entry.module)
        rank = adapters.active_rank(inventory.model, name)
        fused, chosen = None, {}
        if found is None:
            # A head that is kept may be spread since, which is no reason of its own.
            kept = None if entry.adapted else entry.kept
            reason = kept or entry.left_alone or OUTSIDE
        else:
            local, region = found
            fused = region.fused().get(local)
            chosen = _chosen(fused, selector_named(region.records_name)) if fused else {}
            reason = None if fused else region.unfused().get(local, "its block has not run yet")
            if region.graphs is None and entry.read_by_parent:
                reason = READ_PAST_THE_LAYER
        outside = found is None or found[1].planned.left is not None
        changed = entry.adapted or (entry.is_quantized and entry.kept is None)
        if fused is None and outside and changed:
            how = "adapted" if entry.adapted else "quantised"
            reason = entry.left_alone or f"it was {how} after `optimize`; optimize the model again"
        stays = entry.kept or entry.base or entry.read_by_parent
        if fused is None and name in inventory.trained and not stays:
            reason = TRAINED_IN_FULL
        if entry.other_method is not None:
            fused, chosen, reason = None, {}, entry.other_method
        shape = (entry.format, n, k, rank, reason)
        sites.append(Site(name, fused is not None, *shape, **chosen, origin=entry.origin))
    for name, layer in inventory.foreign.items():
        shape = (type(layer).__name__, *foreign.sizes(layer))
        rank = adapters.active_rank(inventory.model, name)
        sites.append(Site(name, False, *shape, rank, foreign.reason(layer)))
    weights = tuple(_expert_sites(inventory, regions))
    modules = {site.name.rpartition(".")[0] for site in weights}
    listed = inventory.linears | inventory.foreign
    others = adapters.other_modules(inventory.modules, listed).items()
    kinds = {id(region.kind): region.kind for region in regions.values()}.values()
    names = {region.records_name for region in regions.values()}
    checks = [*(kind.verifier for kind in kinds), head_loss.check_of(inventory.model)]
    verifiers = [verifier for verifier in checks if verifier is not None]
    return Report(
        (*sites, *weights),
        {name: why for name, why in others if name not in modules},
        tuple(each for verifier in verifiers for each in verifier.certificates.values()),
        tuple(each for verifier in verifiers for each in verifier.mismatches),
        tuple(sorted(name for name in names if not is_known(name))),
        tuple(plans.report()),
        head_loss.described(inventory.model),
    )


def _expert_sites(inventory: Inventory, regions: dict[str, Region]) -> Iterator[Site]:
    for name, site in inventory.experts.items():
        rank = expert_adapters.active_rank(inventory.model, name)
        fused, reason = None, site.obstacle or "its experts run outside the compiled blocks"
        if (found := _enclosing(name, regions)) is not None:
            local, region = found
            fused = region.experts().get(local)
            reason = None if fused else region.unfused().get(local, "its block has not run yet")
        if fused is None and name in inventory.trained:
            reason = TRAINED_IN_FULL
        chosen = {}
        if fused:
            backward = replace(fused.forward, direction="backward") if fused.trains else None
            chosen["forward"] = Chosen.of_experts(fused.forward)
            chosen["backward"] = backward and Chosen.of_experts(backward)
        shape = (site.format, site.n, site.k, rank, reason)
        counted = {"experts": site.experts, "origin": site.origin}
        yield Site(name, fused is not None, *shape, **chosen, **counted)


def _chosen(site: FusedSite, selector: ModelledSelector) -> dict[str, Any]:
    saves = site.trains and selector.prefers_saving(site.forward)
    forward = replace(site.forward, keeps_low_rank=saves)
    backward = replace(forward, direction="backward") if site.trains else None
    return {
        "forward": Chosen.of(forward, selector),
        "backward": backward and Chosen.of(backward, selector),
        "keeps_low_rank": saves,
    }


def _enclosing(name: str, regions: dict[str, Region]) -> tuple[str, Region] | None:
    """Return the innermost region that has the site `name`, after the site's name inside it."""
    best = None
    for prefix, region in regions.items():
        local = name[len(prefix) :].lstrip(".")
        if is_inside(name, prefix) and local in region.sites:
            best = (local, region)
    return best
