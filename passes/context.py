"""PassContext: what passes know beside the graph, and where they record their results."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node

from qlora_compile.kernels.experts.base import PACKED_EXPERTS, ExpertsProblem
from qlora_compile.kernels.problem import Problem

_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']*)'\]")


READ_PAST_THE_LAYER = "the model computes with its weight without calling the layer"


@dataclass(frozen=True)
class FusedSite:
    """One Linear that became part of a `qlora_linear`.

    forward: the Problem of the captured forward. dropout: the probability for the adapter's input.
    trains: whether a backward follows.
    """

    forward: Problem
    dropout: float
    trains: bool


@dataclass(frozen=True)
class FusedExperts:
    """One weight of experts that a `qlora_experts` multiplies with.

    forward: the problem of the captured forward. trains: whether a backward follows.
    """

    forward: ExpertsProblem
    trains: bool


@dataclass
class PassContext:
    """What passes know of a region, and what they record.

    sites: the path inside the region of each Linear ("self_attn.q_proj"; the base of an adapted
    Linear has the path of its adapter layer) and of each weight of experts
    ("mlp.experts.down_proj"). kept: the sites to leave alone, with the reason. fused, experts,
    unfused: what became of each site; for unfused ones the reason. tensors: the names of each
    parameter and buffer, by its `id`.
    """

    sites: frozenset[str]
    kept: dict[str, str] = field(default_factory=dict)
    fused: dict[str, FusedSite] = field(default_factory=dict)
    experts: dict[str, FusedExperts] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    tensors: Mapping[int, Sequence[str]] = field(default_factory=dict)

    def site_of(self, node: object) -> str | None:
        """Return the site whose base weight or bias is the placeholder `node`, else None."""
        site = linear_site(self._name(node))
        return site if site in self.sites else None

    def adapter_site_of(self, node: object) -> str | None:
        """Return the site whose adapter holds the placeholder `node`, else None."""
        site, adapter, _ = self._name(node).partition("lora_")
        site = site.removesuffix(".")
        return site if adapter and site in self.sites else None

    def experts_site_of(self, node: object) -> str | None:
        """Return the site of the weight of experts that is the placeholder `node`, else None."""
        site = experts_site(self._name(node))
        return site if site in self.sites else None

    def _name(self, node: object) -> str:
        """Return the name of the parameter or buffer that `node` stands for, "" if it is none."""
        if not isinstance(node, Node) or node.op != "placeholder":
            return ""
        argument = node.meta.get("grapharg")
        if argument is None or argument.source is None:
            return ""
        name = ".".join(_PART.findall(argument.source.name))
        # After a graph break the source path may start at an inner module, or be a bare tensor.
        names = self.tensors.get(id(argument.example)) if self.tensors else None
        return name if names is None or name in names else names[0]


def linear_site(name: str) -> str:
    """Return the site of a Linear from the `name` of its parameter or buffer."""
    return name.rpartition(".")[0].removesuffix("base_layer").removesuffix(".")


def module_site(node: Node) -> str | None:
    """Return the site whose layer, or adapter layer, the computing `node` stands directly in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # Dynamo writes "L['module'].mlp.up_proj.base_layer".
    path = stack[-1][0].partition("].")[2] if stack else None
    return path and path.removesuffix("base_layer").removesuffix(".")


def experts_site(name: str) -> str:
    """Return the site of a weight of experts from the `name` of its parameter or buffer."""
    parts = [part for part in name.split(".") if part != "base_layer"]
    # The codes of a packed weight are the `weight` of the module that holds it.
    return ".".join(parts).removesuffix(".weight").removesuffix(PACKED_EXPERTS)


def tensor_names(module: nn.Module) -> dict[int, list[str]]:
    """Return the names of each parameter and buffer, by its `id`; a tied one has several names."""
    found: dict[int, list[str]] = defaultdict(list)
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found[id(tensor)].append(name)
    return found
