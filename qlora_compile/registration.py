"""Registers our quantizer with transformers, once transformers' registry is there.

`import qlora_compile` must not import transformers, which takes seconds. If transformers has been
imported, the quantizer is registered at once, otherwise right after transformers' registry.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantizer now, or when transformers' registry is imported."""
    if _REGISTRY in sys.modules:
        import_module("qlora_compile.quantizer")
    else:
        sys.meta_path.insert(0, _AwaitedRegistry())


class _AwaitedRegistry(MetaPathFinder):
    """An import finder that registers the quantizer once transformers' registry is loaded.

    It finds only that module, by asking the finders after itself.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """A loader that lets another loader load a module, then registers the quantizer."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        import_module("qlora_compile.quantizer")
