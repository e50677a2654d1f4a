"""CompressedBase: what all of compressed-tensors' Linears have in common, version 0.20.

Such a Linear has a `quantization_scheme`, and its codes in `weight_packed` or in `weight`, until
the model's first call decompresses it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from qlora_compile.hf.bases.base import RepackedBase

_HOOK = "ct_decompress_hook"


class CompressedBase(RepackedBase):
    """Products with the packed weight do not quantise their inputs."""

    library: ClassVar[str] = "compressed-tensors"

    def weight(self, module: Any) -> Tensor:
        return module.weight_packed if hasattr(module, "weight_packed") else module.weight

    def finish(self, model: nn.Module) -> None:
        """Remove the hook that decompresses the model before its first call, unless a layer needs
        it. The hook would wrap all modules for offloading, which prevents tracing."""
        modules = list(model.modules())
        if any(getattr(module, "quantization_scheme", None) is not None for module in modules):
            return
        for module in modules:
            hook = module.__dict__.pop(_HOOK, None)
            if hook is not None:
                hook.remove()
