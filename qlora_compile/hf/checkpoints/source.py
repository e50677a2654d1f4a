"""Source: the interface of a reader of one kind of quantised checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.kernels.packed import PackedWeight

Settings = Mapping[str, Any]
"""The `quantization_config` of a config.json."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight that a checkpoint stores packed.

    name: the name that the weight would have in a checkpoint that is not quantised, such as
    "model.layers.0.mlp.up_proj.weight". tensors: the names of the tensors that store it, by role,
    such as {"scales": "model.layers.0.mlp.up_proj.scales"}. shape: [N, K], or [E, N, K] for the
    weights of all experts of a layer in one.
    """

    name: str
    tensors: Mapping[str, str]
    shape: tuple[int, ...]


class Source(ABC):
    """Reader of the checkpoints of one `quant_method`; without state.

    `weights` looks at headers alone, and reads what little it needs to know shapes. `packed` gets
    the tensors.
    """

    method: ClassVar[str]
    """The `quant_method` of the checkpoints it reads."""
    beside: ClassVar[tuple[str, ...]] = ()
    """How the names of tensors end that lie beside packed weights and are not read."""

    @abstractmethod
    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        """Yield every weight that is stored packed; modules that the settings exclude have none.

        Raises CheckpointError if a tensor is missing or has the wrong shape or dtype, and
        StoredWeightError if the settings say something that cannot be read.
        """

    @abstractmethod
    def packed(
        self, weight: StoredWeight, tensors: Mapping[str, Tensor], settings: Settings
    ) -> PackedWeight:
        """Make a PackedWeight [N, K], or [E * N, K], of the tensors of `weight`, by role.

        Raises StoredWeightError if their values cannot be read.
        """

    def read(
        self, folder: CheckpointFolder, weight: StoredWeight, settings: Settings
    ) -> PackedWeight:
        """Read one weight. Raises CheckpointError."""
        tensors = {role: folder.read(name) for role, name in weight.tensors.items()}
        try:
            return self.packed(weight, tensors, settings)
        except StoredWeightError as error:
            role = str(error.fields["tensor"])
            raise folder.error(
                weight.tensors.get(role, weight.name),
                str(error.fields["problem"]),
                str(error.fields["remedy"]),
            ) from error


def stems(folder: CheckpointFolder, marker: str) -> Iterator[str]:
    """Yield what stands before `marker` in the names of the tensors that end with it."""
    for name in folder.tensors:
        if name.endswith(marker):
            yield name.removesuffix(marker)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What scales may be stored as."""
