"""A compiler for QLoRA fine-tuning: makes every Linear and its LoRA branch one fused op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_compile.registration import register

if TYPE_CHECKING:
    from qlora_compile.api import explain, load, optimize
    from qlora_compile.hf.saving.save import save
    from qlora_compile.merging import MergeReport, merge
    from qlora_compile.quantized_lora import QuantizedLoRA
    from qlora_compile.quantizer import QloraCompileConfig
    from qlora_compile.report import Report
    from qlora_compile.trainers import optimize_trainer

__version__ = "0.2.0"
__all__ = [
    "MergeReport",
    "QloraCompileConfig",
    "QuantizedLoRA",
    "Report",
    "__version__",
    "explain",
    "load",
    "merge",
    "optimize",
    "optimize_trainer",
    "save",
]

_HOMES = {
    "load": "api",
    "optimize": "api",
    "explain": "api",
    "Report": "report",
    "QuantizedLoRA": "quantized_lora",
    "QloraCompileConfig": "quantizer",
    "save": "hf.saving.save",
    "merge": "merging",
    "MergeReport": "merging",
    "optimize_trainer": "trainers",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: importing the package must not import transformers and PEFT.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


register()
