"""Errors of mixture-of-experts layers; what all errors have in common is in errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class FrozenExpertsError(QloraCompileError):
    template = (
        "{site} requires a gradient, but its op takes it for frozen since optimize; call "
        "requires_grad_(False) on it, or let it require one before optimize to have it trained"
    )
