"""Registry of the kinds of quantised checkpoints that are read directly."""

from __future__ import annotations

from qlora_compile.hf.checkpoints.awq import AwqCheckpoint
from qlora_compile.hf.checkpoints.bitsandbytes import BitsAndBytesCheckpoint
from qlora_compile.hf.checkpoints.compressed_tensors import CompressedTensorsCheckpoint
from qlora_compile.hf.checkpoints.fp8 import Fp8Checkpoint
from qlora_compile.hf.checkpoints.gptq import GptqCheckpoint
from qlora_compile.hf.checkpoints.hqq import HqqCheckpoint
from qlora_compile.hf.checkpoints.modelopt import ModelOptCheckpoint
from qlora_compile.hf.checkpoints.mxfp4 import Mxfp4Checkpoint
from qlora_compile.hf.checkpoints.packed import PackedCheckpoint
from qlora_compile.hf.checkpoints.source import Settings, Source
from qlora_compile.hf.checkpoints.torchao import TorchaoCheckpoint

SOURCES: tuple[Source, ...] = (
    BitsAndBytesCheckpoint(),
    GptqCheckpoint(),
    AwqCheckpoint(),
    HqqCheckpoint(),
    Fp8Checkpoint(),
    Mxfp4Checkpoint(),
    CompressedTensorsCheckpoint(),
    ModelOptCheckpoint(),
    TorchaoCheckpoint(),
    PackedCheckpoint(),
)


def source_of(settings: Settings) -> Source | None:
    """Return the reader of checkpoints with this `quantization_config`; None if there is none."""
    method = settings.get("quant_method")
    return next((source for source in SOURCES if source.method == method), None)
