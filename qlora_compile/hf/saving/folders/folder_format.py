"""FolderFormat: how a folder stores a packed model, and for whom."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.kernels.experts.base import PACKED_EXPERTS
from qlora_compile.kernels.packed import PackedWeight


class FolderFormat(ABC):
    """One way to store packed weights in safetensors; without state.

    name: for users, and the `quant_method` of the library that reads it. stem: the beginning of the
    files' names. single: whether a lone file has no number and no index. turns_conv1d: whether the
    reader takes [N, K] for a Conv1D, whose own weight is [K, N]. reader, code: for the model card,
    what loads the folder and how; {model} is the model's class.
    """

    name: ClassVar[str]
    stem: ClassVar[str] = "model"
    single: ClassVar[bool] = True
    turns_conv1d: ClassVar[bool] = True
    reader: ClassVar[str]
    code: ClassVar[str] = (
        "from transformers import {model}\n\nmodel = {model}.from_pretrained(folder)"
    )

    @abstractmethod
    def obstacle(self, weights: Mapping[str, PackedWeight]) -> str | None:
        """Return why the folder cannot hold `weights`, at least one, by their modules' names; None
        if it can."""

    @abstractmethod
    def tensors(
        self, prefix: str, packed: PackedWeight, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that store one weight, by name.

        prefix: the module's name and a dot. dtype: the weight's dtype before it was packed.
        """

    @abstractmethod
    def quantization_config(
        self, weights: Mapping[str, PackedWeight], unpacked: list[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return `quantization_config` of the folder's config.json.

        unpacked: the names of the model's Linears that are not packed. dtype: the model's.
        """


def of_experts(weights: Mapping[str, PackedWeight]) -> str | None:
    """Return a reason against the folder if one of the `weights` belongs to experts."""
    found = (n.removesuffix(PACKED_EXPERTS) for n in weights if n.endswith(PACKED_EXPERTS))
    return next((f"{name} is a 3-D weight of experts" for name in found), None)


def named(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
