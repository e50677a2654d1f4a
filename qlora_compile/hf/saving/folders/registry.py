"""Registry of the kinds of folders that a packed model is saved in."""

from __future__ import annotations

from qlora_compile.hf.saving.folders.bitsandbytes import EightBitFolder, FourBitFolder
from qlora_compile.hf.saving.folders.compressed_tensors import CompressedTensorsFolder
from qlora_compile.hf.saving.folders.folder_format import FolderFormat
from qlora_compile.hf.saving.folders.packed import PackedFolder

FOLDERS: tuple[FolderFormat, ...] = (
    FourBitFolder(),
    EightBitFolder(),
    CompressedTensorsFolder(),
    PackedFolder(),
)
"""In the order of preference; the last one holds every packed model."""
