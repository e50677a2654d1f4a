"""Triton's file cache without what a power cut has left unfinished: that is made again."""

from __future__ import annotations

from pathlib import Path

from triton.runtime.cache import FileCacheManager

from qlora_compile.kernels.object_file import is_whole_object
from qlora_compile.kernels.torn_kernels import are_whole


class WholeCache(FileCacheManager):
    """Triton's file cache, to which torn kernels and libraries are unknown; what Triton then makes
    replaces their files."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        found = self.noted_files(filename)
        return found if found and are_whole(map(Path, found.values())) else None

    def noted_files(self, filename: str) -> dict[str, str] | None:
        """Return the files of a kernel that are noted."""
        try:
            return super().get_group(filename)
        except ValueError:  # Triton 3.6 reads a note that is cut
            return None

    def get_file(self, filename: str) -> str | None:
        found = super().get_file(filename)
        torn = found is not None and found.endswith(".so") and not is_whole_object(Path(found))
        return None if torn else found
