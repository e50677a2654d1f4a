"""GGUF files, read with the package gguf; blocks that a format of ours holds stay packed.

transformers knows how llama.cpp's names and orders of rows become a model's, and changes decoded
weights accordingly. Here its code is given row and column numbers in place of weights, and what it
does to these numbers is done to the blocks.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers.integrations.gguf import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
    read_field,
)

from qlora_compile.hf.checkpoints.folder import CheckpointFolder, TensorHeader, readable_gguf
from qlora_compile.hf.checkpoints.source import Settings, Source, StoredWeight
from qlora_compile.hf.packings.gguf import PACKINGS

_VALUES = ("F32", "F16", "BF16", "F64")
"""Types of tensors that are stored as plain numbers, not in blocks."""


@dataclass(frozen=True)
class _Part:
    """One tensor of a file. shape: its shape in the model. rows: the order of its rows in the
    model, None if transformers changes more than the order."""

    tensor: Any
    shape: tuple[int, ...]
    rows: Tensor | None

    @property
    def kind(self) -> str:
        return self.tensor.tensor_type.name

    @property
    def stays_packed(self) -> bool:
        return self.rows is not None and self.kind in PACKINGS


class GgufFile(CheckpointFolder):
    """The tensors of a GGUF file by their names in a model: a CheckpointFolder for `read_model`.

    is_known: whether the architecture is read here; if not, as where transformers merges tensors,
    there are no parts, and transformers reads the file. Raises CheckpointError if the file is
    damaged.
    """

    def __init__(self, path: Path, model_class: Any, config: Any) -> None:
        self.path = path
        self.parts: dict[str, _Part] = {}
        self.tensors: dict[str, TensorHeader] = {}
        with readable_gguf(path):
            reader = GGUFReader(path)
            architecture: Any = read_field(reader, "general.architecture")[0]
            # transformers reads these in a newer way, and not by the processors used here.
            self.is_known = not is_gguf_arch_supported(architecture)
            if not self.is_known:
                return
            parsed = load_gguf_checkpoint(str(path))["config"]
            self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed)
            with torch.device("meta"):
                skeleton = model_class(config)
            self._names = get_gguf_hf_weights_map(skeleton, self._processor)
            found = []
            for tensor in reader.tensors:
                name, shape = self._processed(tensor)
                if name is None:
                    self.is_known = False
                    return
                found.append((name, shape, tensor))
        self.parts = {
            self._names[name]: _Part(tensor, shape, self._rows(tensor))
            for name, shape, tensor in found
            if name in self._names
        }
        self.tensors = {
            name: TensorHeader(path, torch.float32, part.shape) for name, part in self.parts.items()
        }

    def _process(self, tensor: Any, weights: Any) -> Any:
        return self._processor.process(
            weights=weights,
            name=tensor.name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": {}},
        )

    def _processed(self, tensor: Any) -> tuple[str | None, tuple[int, ...]]:
        """Return the name and the shape that transformers gives a tensor before it looks for the
        name in the model; no name where it merges the tensor with others."""
        # A negative number, as transformers takes the logarithm of the negative of some tensors.
        weights = numpy.broadcast_to(numpy.float16(-1), _shape(tensor))
        result = self._process(tensor, weights)
        return result.name, result.weights.shape

    def _rows(self, tensor: Any) -> Tensor | None:
        """Return the order in which transformers puts the rows of a weight; None if transformers
        does more, if no format holds its blocks, or if it does not have two dimensions."""
        shape = _shape(tensor)
        if tensor.tensor_type.name not in PACKINGS or len(shape) != 2:
            return None
        rows = numpy.arange(shape[0], dtype=numpy.float64)
        columns = numpy.arange(shape[1], dtype=numpy.float32)
        whole = numpy.broadcast_to(columns, shape)  # no copies: this may be an embedding
        try:
            order = self._process(tensor, numpy.stack((rows, rows), axis=1)).weights
            kept = self._process(tensor, whole).weights
        except ValueError:  # it takes the width from the configuration
            return None
        if order.shape != (shape[0], 2) or kept.shape != shape:
            return None
        if kept is not whole and not (kept == columns).all():
            return None
        if not numpy.array_equal(numpy.sort(order, axis=0), numpy.stack((rows, rows), axis=1)):
            return None
        return torch.from_numpy(order[:, 0].astype(numpy.int64))

    def read(self, name: str) -> Tensor:
        """Return the blocks of a weight that stays packed, uint8 [N, bytes]; else the values."""
        part = self.parts[name]
        if part.stays_packed:
            return torch.from_numpy(numpy.copy(part.tensor.data))[part.rows]
        values = dequantize(part.tensor.data, part.tensor.tensor_type)
        return torch.from_numpy(numpy.copy(self._process(part.tensor, values).weights))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


class GgufSource(Source):
    """Reader of GGUF files, which have no `quantization_config`."""

    method: ClassVar[str] = "gguf"

    def weights(self, folder: Any, settings: Settings) -> Iterator[StoredWeight]:
        """Yield the weights that stay packed; warn of types of blocks that have to be decoded."""
        decoded: Counter[str] = Counter()
        for name, part in folder.parts.items():
            if part.stays_packed:
                yield StoredWeight(name, {"codes": name}, part.shape, PACKINGS[part.kind])
            elif part.kind not in _VALUES:
                decoded[part.kind] += 1
        if decoded:
            listed = ", ".join(f"{count} of {kind}" for kind, count in decoded.items())
            warnings.warn(
                f"{folder.path}: {listed}: no format holds these weights as they are stored; they "
                "are decoded, and optimize(quantize=...) packs them again",
                stacklevel=2,
            )
