"""Registry of the kinds of quantised checkpoints that are read directly."""

from __future__ import annotations

from qlora_compile.hf.checkpoints.bitsandbytes import BitsAndBytesCheckpoint
from qlora_compile.hf.checkpoints.source import Settings, Source

SOURCES: tuple[Source, ...] = (BitsAndBytesCheckpoint(),)


def source_of(settings: Settings) -> Source | None:
    """Return the reader of checkpoints with this `quantization_config`; None if there is none."""
    method = settings.get("quant_method")
    return next((source for source in SOURCES if source.method == method), None)
