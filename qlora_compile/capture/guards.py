"""Guards: which of Dynamo's checks a compiled block repeats in every call.

Each time it runs a block, Dynamo checks everything that it read while it traced the block, about a
thousand things. The checks of inputs, shapes, modes, modules and their attributes, parameters,
adapters, and the Python functions that the block calls are kept. Checks of what does not change
between two calls, or is checked otherwise, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from qlora_compile.hf.own_graphs import in_own_graph
from qlora_compile.modules.packed import PackedModule

_GLOBAL_HOOKS = re.compile(r"\._global_(forward|backward)_(pre_)?hooks\b")
"""The caller of a block looks for hooks first, by a `HookWatch`."""

_MODULE_DICTIONARY = re.compile(r"\._(modules|parameters|buffers)$")
"""Always a dict in an nn.Module, whose entries have checks of their own."""

_DEFAULTS = re.compile(r"\.__(kw)?defaults__\b")
"""Defaults of a function; elsewhere, too, Dynamo assumes that these stay the same
(assume_dunder_attributes_...)."""

_NAMESPACE = re.compile(r"dict\(type\((?P<object>.+)\)\.__mro__\[(?P<at>\d+)\]\.__dict__\)")
"""The attributes of one of the classes that an object inherits from."""


def kept_guards(module: nn.Module, entries: Sequence[Any]) -> list[bool]:
    """Whether each guard that Dynamo made for a call of the block `module` is checked.

    entries: as torch.compile's option "guard_filter_fn" is given them.
    """
    planes = {id(plane) for plane in _side_planes(module.modules())}
    kept = [entry for entry in entries if _is_kept(entry, planes)]
    checked = {id(entry) for entry in kept} - {id(entry) for entry in _repetitions(kept)}
    return [id(entry) in checked for entry in entries]


def _repetitions(entries: Sequence[Any]) -> Iterable[Any]:
    """Yield the guards on a base class that other guards repeat for further objects.

    Dynamo of torch 2.11 checks for every object anew that none of its base classes has gained an
    attribute. The objects' own classes are checked, so once is enough.
    """
    classes = {each.name: type(each.value) for each in entries if each.guard_type == "TYPE_MATCH"}
    seen: set[object] = set()
    for entry in entries:
        match = _NAMESPACE.fullmatch(entry.name)
        check = entry.orig_guard.create_fn
        if match and match["object"] in classes and isinstance(check, partial):
            base = classes[match["object"]].__mro__[int(match["at"])]
            key = base, entry.guard_type, check.args, tuple(sorted(check.keywords.items()))
            if key in seen:
                yield entry
            seen.add(key)


def _side_planes(modules: Iterable[nn.Module]) -> Iterable[object]:
    """Yield the planes that need no check: their dtypes and shapes follow from the Layout, they
    move only with the codes, and both Layout and codes are checked."""
    for module in modules:
        if isinstance(module, PackedModule):
            yield from module.tensors[1:]


def _is_kept(entry: Any, planes: set[int]) -> bool:
    name, kind = entry.name, entry.guard_type
    if id(entry.value) in planes or ".side_names" in name or entry.value is in_own_graph:
        return False
    if not entry.is_global:
        return kind != "TYPE_MATCH" or not _MODULE_DICTIONARY.search(name)
    if isinstance(entry.value, ModuleType) or name.startswith("G['__builtins_dict"):
        # Whatever is read from a module has a check of its own.
        return False
    if ".os.environ" in name:
        return kind.startswith("DICT")
    # The functions of torch that other libraries replace are in nn.functional.
    own = ".torch." in name and ".functional." not in name
    return not (own or _GLOBAL_HOOKS.search(name) or _DEFAULTS.search(name))
