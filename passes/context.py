"""What a pass knows besides the graph, and what it reports back."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch.fx import Node

from qlora_compile.kernels.experts.base import ExpertsProblem
from qlora_compile.problem import Problem

_MODULE = re.compile(r"_modules\['([^']*)'\]")


@dataclass(frozen=True)
class FusedSite:
    """One Linear that became a `qlora_linear`: its forward as it was captured, the dropout
    probability of the adapter's input, and whether a backward follows."""

    forward: Problem
    dropout: float
    trains: bool


@dataclass(frozen=True)
class FusedExperts:
    """One weight of experts that a `qlora_experts` computes: its forward as it was captured."""

    forward: ExpertsProblem
    trains: bool


@dataclass
class PassContext:
    """The Linears of a region, each by its path in it ("self_attn.q_proj"; the base of an adapted
    one under the adapted path) and weights of experts ("mlp.experts.down_proj"), those to leave
    alone with the reason, and what became of each."""

    sites: frozenset[str]
    kept: dict[str, str] = field(default_factory=dict)
    fused: dict[str, FusedSite] = field(default_factory=dict)
    experts: dict[str, FusedExperts] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)

    def site_of(self, node: object) -> str | None:
        """The site whose base weight the placeholder `node` is."""
        path = _module_path(node)
        if path is None:
            return None
        site = path.removesuffix("base_layer").removesuffix(".")
        return site if site in self.sites else None

    def adapter_site_of(self, node: object) -> str | None:
        """The site to whose adapter the placeholder `node` belongs."""
        path = _module_path(node)
        if path is None or "lora_" not in path:
            return None
        site = path[: path.index("lora_")].removesuffix(".")
        return site if site in self.sites else None


def _module_path(node: object) -> str | None:
    """Path inside the region of the module that owns the parameter or buffer `node` stands for."""
    if not isinstance(node, Node) or node.op != "placeholder":
        return None
    graph_argument = node.meta.get("grapharg")
    if graph_argument is None or graph_argument.source is None:
        return None
    return ".".join(_MODULE.findall(graph_argument.source.name))
