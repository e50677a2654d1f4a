"""CheckpointFolder: the tensors of a folder's safetensors files, known by their headers.

The index and every header are read and compared before any tensor is read. Pickled files are never
opened. The format is described at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qlora_compile.checkpoint_errors import CheckpointError
from qlora_compile.json_text import parsed_json

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
AGAIN = "download the file again"


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says about one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointFolder:
    """The tensors of a folder, by name. Files stay open as long as the object lives.

    stem: the beginning of the files' names. tensors: the headers of all tensors. Raises
    CheckpointError if the folder has no safetensors, a shard is missing or cut short, a header
    cannot be read, or the index names another file for a tensor than the one that holds it.
    """

    def __init__(self, path: Path, stem: str = "model") -> None:
        self.path = path
        self._files: dict[Path, Any] = {}
        self.tensors: dict[str, TensorHeader] = {}
        index = path / SAFE_WEIGHTS_INDEX_NAME.replace("model", stem)
        whole = path / SAFE_WEIGHTS_NAME.replace("model", stem)
        if index.is_file():
            self._read_sharded(index)
        elif whole.is_file():
            self.tensors |= self._headers(whole)
        else:
            raise CheckpointError(
                file=path,
                tensor="all weights",
                problem=f"there is neither {whole.name} nor {index.name}",
                remedy="download the model's safetensors files; pickled weights are not read",
            )

    def _read_sharded(self, index: Path) -> None:
        for file, names in _shards(index).items():
            found = self._headers(file)
            if odd := sorted(names ^ found.keys()):
                name, lost = odd[0], odd[0] in names
                raise CheckpointError(
                    file=file,
                    tensor=name,
                    problem=f"the index {'places' if lost else 'does not place'} it in this file, "
                    f"which {'does not hold' if lost else 'holds'} it",
                    remedy=f"{AGAIN}, and {index.name}",
                )
            self.tensors |= found

    def _headers(self, file: Path) -> dict[str, TensorHeader]:
        if not file.is_file():
            raise _unreadable(file, "the file is missing")
        found = {}
        opened = self._files[file] = _opened(file)
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            stored = part.get_dtype()
            if stored not in _DTYPES:
                raise CheckpointError(
                    file=file,
                    tensor=name,
                    problem=f"it is stored as {stored}, which is none of {', '.join(_DTYPES)}",
                    remedy=AGAIN,
                )
            found[name] = TensorHeader(file, _DTYPES[stored], tuple(part.get_shape()))
        return found

    def metadata(self, name: str) -> Mapping[str, str]:
        """Return the metadata in the header of the file that holds the tensor `name`."""
        return self._files[self.tensors[name].file].metadata() or {}

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor, on the CPU. Raises CheckpointError."""
        try:
            return self._files[self.tensors[name].file].get_tensor(name).clone()
        except SafetensorError as error:
            raise self.error(name, str(error), AGAIN) from error

    def check(
        self,
        name: str,
        *,
        dtypes: Sequence[torch.dtype] = (),
        shape: Sequence[int | None] | None = None,
    ) -> tuple[int, ...]:
        """Return the shape of a tensor, after a check of its dtype and shape.

        A size of None allows any size, and empty `dtypes` any dtype. Raises CheckpointError, also
        if the tensor is missing.
        """
        if name not in self.tensors:
            raise CheckpointError(
                file=self.path, tensor=name, problem="the tensor is missing", remedy=AGAIN
            )
        header = self.tensors[name]
        if dtypes and header.dtype not in dtypes:
            known = " or ".join(map(str, dtypes))
            raise self.error(name, f"it is stored as {header.dtype}, not {known}", AGAIN)
        if shape is not None and (
            len(shape) != len(header.shape)
            or any(size not in (None, own) for size, own in zip(shape, header.shape, strict=True))
        ):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(
                name,
                f"its shape is {list(header.shape)}, not [{expected}]",
                f"{AGAIN}, and config.json",
            )
        return header.shape

    def error(self, name: str, problem: str, remedy: str) -> CheckpointError:
        """Return an error about a tensor, which may be missing."""
        file = self.tensors[name].file if name in self.tensors else self.path
        return CheckpointError(file=file, tensor=name, problem=problem, remedy=remedy)


def _shards(index: Path) -> dict[Path, set[str]]:
    """Return the names of the tensors in each file that the index names."""
    try:
        places = parsed_json(index.read_text(encoding="utf-8"))["weight_map"]
        pairs: Iterator[tuple[str, Any]] = iter(places.items())
        files: dict[Path, set[str]] = {}
        for name, file in pairs:
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{file!r} is not the name of a file")
            files.setdefault(index.parent / file, set()).add(name)
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(index, f"the index cannot be read ({error})") from error


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, f"the header cannot be read ({error})") from error


_DAMAGED = (ValueError, IndexError, KeyError, OverflowError, struct.error, OSError)
"""What the package gguf raises for a file that is damaged or not a GGUF file."""


@contextmanager
def readable_gguf(file: str | Path) -> Iterator[None]:
    """Turn what the package gguf raises for a damaged file into a CheckpointError."""
    try:
        yield
    except _DAMAGED as error:
        raise _unreadable(Path(file), f"the file cannot be read ({error})") from error


def _unreadable(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(file=file, tensor="all tensors", problem=problem, remedy=AGAIN)
