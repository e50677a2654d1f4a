"""Shards: writes tensors, one after another, into safetensors files of a limited size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_compile.saving_errors import ShardSizeError

USUAL_SIZE = "5GB"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(size: int | str) -> int:
    """Return the bytes of a size such as 5000000000 or "5GB".

    Raises:
        ShardSizeError: it is neither.
    """
    found = re.fullmatch(r"(\d+) ?([KMGT]B|)", str(size).upper())
    if isinstance(size, bool) or found is None or int(found[1]) == 0:
        raise ShardSizeError(value=size)
    return int(found[1]) * _UNITS[found[2]]


class Shards:
    """Writes `stem`-00001-of-0000N.safetensors and an index into `folder`.

    Tensors are held until a shard is full, `limit` bytes; one that is larger gets a shard of its
    own. `finish` writes the last shard and the index. If `single`, one shard is named
    `stem`.safetensors and has no index, as transformers does.
    """

    def __init__(self, folder: Path, stem: str, limit: int, *, single: bool) -> None:
        self._folder, self._stem, self._limit, self._single = folder, stem, limit, single
        self._held: dict[str, Tensor] = {}
        self._written: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        held = sum(each.nbytes for each in self._held.values())
        if self._held and held + tensor.nbytes > self._limit:
            self._write()
        # safetensors takes no part of a larger storage.
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        kept = tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)
        self._held[name] = kept
        self._total += tensor.nbytes

    def finish(self) -> list[Path]:
        """Return the files of the shards."""
        if self._held or not self._written:
            self._write()
        count = len(self._written)
        files = [self._folder / self._file(number, count) for number in range(count)]
        for number, file in enumerate(files):
            self._part(number).rename(file)
        if count > 1 or not self._single:
            pairs = zip(files, self._written, strict=True)
            weight_map = {name: file.name for file, names in pairs for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            path = self._folder / f"{self._stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return files

    def _write(self) -> None:
        save_file(self._held, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._held))
        self._held = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"{self._stem}-{number + 1:05d}.safetensors.part"

    def _file(self, number: int, count: int) -> str:
        if count == 1 and self._single:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{number + 1:05d}-of-{count:05d}.safetensors"
