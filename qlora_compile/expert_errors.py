"""Errors of mixture-of-experts layers; their base class is in errors.py."""

from __future__ import annotations

import torch

from qlora_compile.errors import QloraCompileError


class FrozenExpertsError(QloraCompileError):
    template = (
        "{site} requires a gradient, but was frozen when optimize compiled it; call "
        "requires_grad_(False) on it or, to train it, requires_grad_(True) before optimize"
    )


@torch.compiler.disable()
def raise_frozen(site: str) -> None:
    """Raise FrozenExpertsError. Traced, the error would reach users as one of Dynamo's own."""
    raise FrozenExpertsError(site=site)
