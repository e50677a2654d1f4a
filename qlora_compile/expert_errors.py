"""Errors of mixture-of-experts layers; their base class is in errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class FrozenExpertsError(QloraCompileError):
    template = (
        "{site} requires a gradient, but since optimize its op takes it for frozen; call "
        "requires_grad_(False) on it or, to train it, requires_grad_(True) before optimize"
    )
