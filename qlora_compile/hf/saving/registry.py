"""Registry of the kinds of folders that a packed model is saved in."""

from __future__ import annotations

from qlora_compile.hf.saving.bitsandbytes_folder import EightBitFolder, FourBitFolder
from qlora_compile.hf.saving.compressed_tensors_folder import CompressedTensorsFolder
from qlora_compile.hf.saving.folder_format import FolderFormat
from qlora_compile.hf.saving.packed_folder import PackedFolder

FOLDERS: tuple[FolderFormat, ...] = (
    FourBitFolder(),
    EightBitFolder(),
    CompressedTensorsFolder(),
    PackedFolder(),
)
"""In the order of preference; the last one holds every packed model."""
