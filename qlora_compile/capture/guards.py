"""Guards: which of Dynamo's checks a compiled block repeats in every call.

Each time it runs a block, Dynamo checks everything that it read while it traced the block, about a
thousand things. The checks of inputs, shapes, modes, modules and their attributes, parameters,
adapters, and the Python functions that the block calls are kept. Checks of what does not change
between two calls, or is checked otherwise, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from qlora_compile.modules.packed import PackedModule

_GLOBAL_HOOKS = re.compile(r"\._global_(forward|backward)_(pre_)?hooks\b")
"""The caller of a block looks for hooks first, by `HookWatch`."""

_MODULE_DICTIONARY = re.compile(r"\._(modules|parameters|buffers)$")
"""Always a dict in an nn.Module, whose entries have checks of their own."""

_DEFAULTS = re.compile(r"\.__(kw)?defaults__\b")
"""Defaults of a function; elsewhere, too, Dynamo assumes that these stay the same
(assume_dunder_attributes_...)."""


def kept_guards(module: nn.Module, entries: Sequence[Any]) -> list[bool]:
    """Whether each guard that Dynamo made for a call of the block `module` is checked.

    entries: as torch.compile's option "guard_filter_fn" is given them.
    """
    planes = {id(plane) for plane in _side_planes(module.modules())}
    return [_is_kept(entry, planes) for entry in entries]


def _side_planes(modules: Iterable[nn.Module]) -> Iterable[object]:
    """Yield the planes that need no check: their dtypes and shapes follow from the Layout, they
    move only with the codes, and both Layout and codes are checked."""
    for module in modules:
        if isinstance(module, PackedModule):
            yield from module.tensors[1:]


def _is_kept(entry: Any, planes: set[int]) -> bool:
    name, kind = entry.name, entry.guard_type
    if id(entry.value) in planes or ".side_names" in name:
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
