"""Source: the interface of a reader of one kind of quantised checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import CheckpointError, StoredWeightError
from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.kernels.packed import PackedWeight

Settings = Mapping[str, Any]
"""The `quantization_config` of a config.json."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight that a checkpoint stores packed.

    name: the name that the weight would have in a checkpoint that is not quantised, such as
    "model.layers.0.mlp.up_proj.weight". tensors: the names of the tensors that store it, by role,
    such as {"scales": "model.layers.0.mlp.up_proj.scales"}. shape: [N, K], or [E, N, K] for one
    weight of all experts of a layer. pack: makes a PackedWeight [N, K], or [E * N, K], from the
    tensors by role, and raises StoredWeightError if their values cannot be read.
    """

    name: str
    tensors: Mapping[str, str]
    shape: tuple[int, ...]
    pack: Callable[[Mapping[str, Tensor]], PackedWeight]

    def read(self, folder: CheckpointFolder) -> PackedWeight:
        """Read and pack the weight. Raises CheckpointError."""
        tensors = {role: folder.read(name) for role, name in self.tensors.items()}
        with named(folder, self.tensors, self.name):
            return self.pack(tensors)


@contextmanager
def named(folder: CheckpointFolder, tensors: Mapping[str, str], name: str = "") -> Iterator[None]:
    """Turn a StoredWeightError of the body into a CheckpointError, which names file and tensor.

    tensors: names by role. name: of the weight, for an error about another role.
    """
    try:
        yield
    except StoredWeightError as error:
        tensor = tensors.get(str(error.fields["tensor"]), name)
        problem, remedy = str(error.fields["problem"]), str(error.fields["remedy"])
        raise folder.error(tensor, problem, remedy) from error


class Source(ABC):
    """Reader of the checkpoints of one `quant_method`; without state."""

    method: ClassVar[str]
    """The `quant_method` of the checkpoints it reads."""
    stem: ClassVar[str] = "model"
    """The beginning of the names of its files."""
    beside: ClassVar[tuple[str, ...]] = ()
    """How the names of tensors end that lie beside packed weights and are not read."""

    @abstractmethod
    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        """Yield every weight that is stored packed; modules that the settings exclude have none.

        Only headers are read, and small tensors that say how others are stored. Raises
        CheckpointError if a tensor is missing or has the wrong shape or dtype, and
        StoredWeightError if the settings cannot be used.
        """


def stems(folder: CheckpointFolder, marker: str) -> Iterator[str]:
    """Yield the part before `marker` of each tensor's name that ends with `marker`."""
    for name in folder.tensors:
        if name.endswith(marker):
            yield name.removesuffix(marker)


def rescaling_error(folder: CheckpointFolder, name: str) -> CheckpointError:
    """Return the error for a tensor by which the quantised model rescales activations."""
    problem = "it rescales activations, which nothing here does"
    remedy = "load the unquantised model and pack it by optimize(quantize=...)"
    return folder.error(name, problem, remedy)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that scales may have."""
