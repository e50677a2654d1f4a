"""Stages: the results of a training beside a float64 evaluation of base and adapters.

A certificate of a block says that training was right. The stages after training are checked by what
the whole model computes on real text: the adapter as it is read again, by us and by PEFT, the
packed model as it is read again, and the merged model.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.hf.loading import load_model, with_adapter
from qlora_compile.hf.merging.distance import evaluating
from qlora_compile.hf.merging.write import write_merged
from qlora_compile.hf.saving.base_tensors import pretrained
from qlora_compile.verify.comparing import FACTOR, NOISE


@dataclass(frozen=True)
class Stage:
    """The error of one stage: Euclidean norm of the difference of all logits from the reference,
    divided by that of the reference.

    plain_error: that of stock PEFT over the dequantised base, in the dtype of the stage; where PEFT
    itself is the stage, that of the merged model. allowed: the largest `error` that passes.
    """

    name: str
    error: float
    plain_error: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.error / self.plain_error

    @property
    def passes(self) -> bool:
        return self.error <= self.allowed  # false for NaN

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "passes": self.passes}


def check_stages(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    name: str = "adapter",
    adapter: Path | None = None,
    packed: Path | None = None,
    merged: Path | None = None,
) -> list[Stage]:
    """Compare models with the float64 reference, which has the dequantised base of `model` with its
    adapters merged in float32.

    The models are `model` itself, as a stage of this `name`; stock PEFT over the dequantised base
    in float32, with the folder `adapter`; the packed folder, with that adapter; and the folder
    `merged`. What an error is judged by is read from temporary folders. sequences: token ids.
    """
    base, device = pretrained(model), next(model.parameters()).device
    stock, ids = type(base), [torch.tensor([each], device=device) for each in sequences]

    def error(found: nn.Module) -> float:
        return _distance(_logits(found.to(device), ids), reference)

    def adapted(found: Any) -> Any:
        return found if adapter is None else with_adapter(found, adapter)

    with tempfile.TemporaryDirectory(prefix="qlora_compile-") as temporary:
        folder = Path(temporary)
        writing: Any = {"dtype": torch.float32, "max_shard_size": "5GB"}
        write_merged(model, folder / "whole", weights=None, **writing)
        whole = stock.from_pretrained(folder / "whole", dtype=torch.float32).to(device)
        reference = _logits(whole.double(), ids)
        merged_error = error(whole.float())
        del whole

        @functools.cache
        def usual(dtype: torch.dtype) -> float:
            write_merged(model, folder / "base", weights={}, **writing | {"dtype": dtype})
            return error(adapted(stock.from_pretrained(folder / "base", dtype=dtype)))

        def stage(name: str, found: float, dtype: torch.dtype) -> Stage:
            plain = max(usual(dtype), NOISE[dtype])
            return Stage(name, found, plain, FACTOR * plain)

        stages = []
        if adapter is not None:
            plain = max(merged_error, NOISE[torch.float32])
            stages.append(
                Stage("adapter in stock PEFT", usual(torch.float32), plain, FACTOR * plain)
            )
        stages.append(stage(name, error(model), base.dtype))
        if packed is not None:
            again = load_model(packed, dtype=base.dtype)
            stages.append(stage("packed", error(adapted(again)), base.dtype))
        if merged is not None:
            found = stock.from_pretrained(merged, dtype="auto")
            stages.append(stage("merged", error(found), found.dtype))
    return stages


@torch.no_grad()
def _logits(model: nn.Module, ids: Sequence[Tensor]) -> list[Tensor]:
    with evaluating(model):
        return [model(input_ids=each).logits.double().cpu() for each in ids]


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    gap = sum(float((a - b).square().sum()) for a, b in pairs)
    return (gap / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
