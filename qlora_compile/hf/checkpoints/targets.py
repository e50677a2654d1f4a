"""Targets: the places in a model where the packed weights of a checkpoint belong.

transformers has rules for turning the names of a checkpoint into those of a model, and for merging
the tensors of single experts into one. Here the same rules are applied to packed weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_compile.hf import experts
from qlora_compile.hf.checkpoints.folder import AGAIN, CheckpointFolder
from qlora_compile.hf.checkpoints.source import StoredWeight
from qlora_compile.hf.conv1d import Conv1D, features
from qlora_compile.hf.experts import ExpertSite


@dataclass(frozen=True)
class Lazy:
    """A tensor of `shape` that is read when transformers indexes it.

    decoded: whether it is a packed weight, which is decoded when it is read.
    """

    shape: tuple[int, ...]
    decoded: bool
    read: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]


@dataclass(frozen=True)
class Target:
    """A parameter of a model, and the stored weights that form it, one below another.

    shape: [N, K] of a Linear; [E * N, K] of experts, whose `site` is not None.
    """

    name: str
    module: nn.Module
    pieces: tuple[StoredWeight, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    site: ExpertSite | None


def targets(model: Any, weights: Iterable[StoredWeight]) -> Iterator[Target]:
    """Yield a Target for every parameter of `model` that can stay packed, with its `weights`.

    Such a parameter is the weight of an nn.Linear or Conv1D, or of experts that our op computes.
    Weights of other parameters have no target.
    """
    modules = dict(model.named_modules())
    ties = model.all_tied_weights_keys
    tied = {*ties, *ties.values()}
    sites = experts.sites(modules)
    for name, parts in _parts(model, weights).items():
        if name in tied:
            continue
        path, _, parameter = name.rpartition(".")
        module: Any = modules.get(path)
        site = sites.get(name)
        if site is not None and site.obstacle in (None, experts.TRAINED):
            pieces = tuple(_by_expert(parts, site.experts))
            shape = (site.experts * site.n, site.k)
            if pieces:
                yield Target(name, site.module, pieces, shape, site.weight.dtype, site)
        elif type(module) in (nn.Linear, Conv1D) and (parameter, *parts) == ("weight", None):
            pieces = tuple(parts[None])
            yield Target(name, module, pieces, features(module), module.weight.dtype, None)


_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Parts = dict[str | None, list[StoredWeight]]
"""Stored weights by the pattern of transformers that merges them, None if there is none."""


class _Names:
    """The rules by which transformers finds the parameter of `model` that a tensor belongs to.

    merging: the converters that only join the weights of single experts, by pattern.
    """

    def __init__(self, model: Any) -> None:
        self.prefix = model.base_model_prefix
        self.empty: dict[str, Tensor] = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.merging = {
            pattern: converter
            for converter in self.converters
            if _only_merges(converter)
            for pattern in converter.source_patterns
        }

    def place(self, name: str) -> tuple[str, str | None]:
        """Return the name of the parameter, and the pattern of the converter that makes it."""
        place, pattern = rename_source_key(
            name, self.renamings, self.converters, self.prefix, self.empty
        )
        if place not in self.empty and name in self.empty:
            return name, None
        return place, pattern


def _parts(model: Any, weights: Iterable[StoredWeight]) -> Mapping[str, Parts]:
    """Return the stored `weights` of each parameter, by its name, in transformers' order."""
    names = _Names(model)
    found: dict[str, Parts] = {}
    for weight in sorted(weights, key=lambda each: dot_natural_key(each.name)):
        name, pattern = names.place(weight.name)
        if pattern is not None and pattern not in names.merging:
            continue
        order = [None] if pattern is None else names.merging[pattern].source_patterns
        parts = found.setdefault(name, {each: [] for each in order})
        parts.setdefault(pattern, []).append(weight)
    return found


def check_rest(
    model: Any, folder: CheckpointFolder, rest: Mapping[str, Lazy], packed: Collection[str]
) -> None:
    """Raise CheckpointError if a tensor for transformers to load does not fit `model`.

    Each must have the shape of its parameter, and hold numbers that need no scales. None may be
    missing, except for the `packed` parameters."""
    names = _Names(model)
    found, certain = set(packed), True
    merged: dict[str, list[str]] = {}
    for tensor, lazy in rest.items():
        name, pattern = names.place(tensor)
        found.add(name)
        # A converter that makes several parameters is listed under the first one.
        certain &= pattern is None or pattern in names.merging
        if name not in names.empty:
            continue  # transformers reports unknown names
        empty = names.empty[name]
        if not lazy.decoded:
            dtype = folder.tensors[tensor].dtype
            if empty.is_floating_point() and dtype not in _READABLE:
                problem = f"it is stored as {dtype}, but its scales are missing"
                raise folder.error(tensor, problem, AGAIN)
        if pattern is None and lazy.shape != tuple(empty.shape):
            problem = f"its shape is {list(lazy.shape)}, but {name} is {list(empty.shape)}"
            raise folder.error(tensor, problem, f"{AGAIN}, and config.json")
        if pattern in names.merging:
            merged.setdefault(name, []).append(tensor)
    for name, parts in merged.items():
        count, whole = sum(math.prod(rest[part].shape) for part in parts), names.empty[name].numel()
        if count != whole:
            problem = f"the {len(parts)} parts of {name} have {count} elements, not {whole}"
            raise folder.error(min(parts), problem, f"{AGAIN}, and config.json")
    ties = model.all_tied_weights_keys
    ignored = [re.compile(rule) for rule in model._keys_to_ignore_on_load_missing or ()]
    missing = sorted(names.empty.keys() - found - ties.keys() - set(ties.values()))
    for name in missing if certain else ():
        if not any(rule.search(name) for rule in ignored):
            raise folder.error(name, "the tensor is missing", AGAIN)


def _only_merges(converter: WeightConverter) -> bool:
    """Whether a converter only stacks experts and joins the rows of their weights."""
    return len(converter.target_patterns) == 1 and all(
        (type(step) is MergeModulelist and step.dim == 0)
        or (type(step) is Concatenate and step.dim == 1)
        for step in converter.operations
    )


def _by_expert(parts: Parts, count: int) -> list[StoredWeight]:
    """Return the weights in the order of experts; none if they do not belong to `count` experts."""
    if list(parts) == [None]:
        return parts[None]
    lists = list(parts.values())
    if any(len(each) != count for each in lists):
        return []
    return [weight for expert in zip(*lists, strict=True) for weight in expert]
