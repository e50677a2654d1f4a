"""Stages: a model's logits after training, beside a float64 evaluation of base and adapters.

A certificate of a block says that training was right. The stages after training, the adapter as it
is read again and the merged model, are checked by what the whole model computes on real text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.hf.loading import with_adapter
from qlora_compile.hf.merging.distance import evaluating
from qlora_compile.hf.merging.write import write_merged
from qlora_compile.verify.check import FACTOR, NOISE


@dataclass(frozen=True)
class Stage:
    """The error of one stage: Euclidean norm of the difference of all logits from the reference,
    divided by that of the reference.

    plain_error: the error of stock PEFT over the dequantised base, in the model's dtype. allowed:
    the largest `error` that passes.
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
    model: Any, sequences: Sequence[Sequence[int]], merged: Path | None = None
) -> list[Stage]:
    """Compare a PeftModel, and the model in the folder `merged`, with the float64 reference.

    The reference is the dequantised base with the adapters merged in float32. A second model, the
    dequantised base with the adapters as stock PEFT reads and runs them in the dtype of `model`,
    shows the usual error. Both are written to a temporary folder. sequences: token ids.
    """
    dtype, device = model.get_base_model().dtype, next(model.parameters()).device
    stock = type(model.get_base_model())
    ids = [torch.tensor([sequence], device=device) for sequence in sequences]
    chosen: Any = {"max_shard_size": "5GB"}
    with tempfile.TemporaryDirectory(prefix="qlora_compile-") as name:
        folder = Path(name)
        write_merged(model, folder / "whole", dtype=torch.float32, weights=None, **chosen)
        whole = stock.from_pretrained(folder / "whole", dtype=torch.float32)
        reference = _logits(whole.to(device).double(), ids)
        del whole
        write_merged(model, folder / "base", dtype=dtype, weights={}, **chosen)
        model.save_pretrained(str(folder / "adapter"))
        base = stock.from_pretrained(folder / "base", dtype=dtype).to(device)
        plain = with_adapter(base, folder / "adapter")
        usual = _distance(_logits(plain, ids), reference)
        del plain, base
    stages = {"adapter": _distance(_logits(model, ids), reference)}
    if merged is not None:
        loaded = stock.from_pretrained(merged, dtype="auto").to(device)
        stages["merged"] = _distance(_logits(loaded, ids), reference)
    usual = max(usual, NOISE[dtype])
    return [Stage(name, error, usual, FACTOR * usual) for name, error in stages.items()]


@torch.no_grad()
def _logits(model: nn.Module, ids: Sequence[Tensor]) -> list[Tensor]:
    with evaluating(model):
        return [model(input_ids=each).logits.double().cpu() for each in ids]


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    gap = sum(float((a - b).square().sum()) for a, b in pairs)
    return (gap / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
