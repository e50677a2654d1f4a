"""One call of the chunked head loss with everything it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from qlora_compile.kernels.head_loss import chunked_cross_entropy
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import UNQUANTIZED, format_named
from tests.format_options import fitting

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


class Precision(NamedTuple):
    """Dtypes of hidden, weight and bias, and of the adapter; autocast computes in bfloat16."""

    base: torch.dtype
    adapter: torch.dtype
    autocast: bool = False

    @property
    def lowest(self) -> torch.dtype:
        return BF16 if self.autocast else self.base

    @property
    def eps(self) -> float:
        return torch.finfo(self.lowest).eps


PRECISIONS = (
    Precision(F64, F64),
    Precision(F32, F32),
    Precision(BF16, F32),
    Precision(BF16, BF16),
    Precision(F32, F32, autocast=True),
)


@dataclass(frozen=True)
class Case:
    """rows, vocabulary and width are M, V and K; `ignored` of the labels count for nothing."""

    rows: int = 7
    vocabulary: int = 19
    width: int = 12
    rank: int = 0
    bias: bool = False
    format: str = UNQUANTIZED
    precision: Precision = PRECISIONS[1]
    ignored: float = 0.3
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    chunk: int | None = None
    vocabulary_chunk: int | None = None
    seed: int = 0

    def build(self) -> Call:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).mul_(scale).to(dtype)

        d, rank = self.precision, self.rank
        tensors = {
            "hidden": normal(self.rows, self.width, dtype=d.base),
            "weight": normal(self.vocabulary, self.width, dtype=d.base, scale=0.5),
        }
        packed = None
        if self.format != UNQUANTIZED:
            packed = format_named(self.format).quantize(
                tensors["weight"], **fitting(self.format, 32)
            )
            tensors["weight"] = format_named(self.format).dequantize(packed, d.base)
        if self.bias:
            tensors["bias"] = normal(self.vocabulary, dtype=d.base)
        if rank:
            tensors["lora_a"] = normal(rank, self.width, dtype=d.adapter, scale=0.3)
            tensors["lora_b"] = normal(self.vocabulary, rank, dtype=d.adapter)
        labels = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        ignored = torch.rand(self.rows, generator=generator) < self.ignored
        return Call(self, tensors, packed, labels.masked_fill(ignored, -100))


@dataclass(frozen=True)
class Call:
    case: Case
    tensors: dict[str, Tensor]
    packed: PackedWeight | None
    labels: Tensor

    def chunked(self) -> dict[str, Tensor]:
        """Return the loss, scaled by 3 as in the other methods, and all gradients."""
        case, leaves = self.case, self.leaves()
        weight = leaves["weight"] if self.packed is None else self.packed
        with torch.autocast("cpu", BF16, enabled=case.precision.autocast):
            loss = chunked_cross_entropy(
                leaves["hidden"],
                weight,
                self.labels,
                bias=leaves.get("bias"),
                lora_a=leaves.get("lora_a"),
                lora_b=leaves.get("lora_b"),
                scaling=1.5,
                softcap=case.softcap,
                logit_scale=case.logit_scale,
                label_smoothing=case.label_smoothing,
                reduction=case.reduction,
                chunk=case.chunk,
                vocabulary_chunk=case.vocabulary_chunk,
            )
        if self.packed is not None:
            del leaves["weight"]
        return _results(loss, leaves)

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Compute with all logits at once, in the case's dtypes like a model and PEFT, or in
        `dtype`."""
        leaves = self.leaves(dtype)
        autocast = self.case.precision.autocast and dtype is None
        with torch.autocast("cpu", BF16, enabled=autocast):
            logits = self.logits(leaves)
            loss = cross_entropy(
                logits if logits.dtype == F64 else logits.float(),
                self.labels,
                label_smoothing=self.case.label_smoothing,
                reduction=self.case.reduction,
            )
        return _results(loss, leaves)

    def magnitudes(self) -> dict[str, Tensor]:
        """Return what each gradient would be if nothing cancelled, float64: the scale of roundings.
        That of a logit, which is relative to it, is an absolute one of its probability's
        logarithm."""
        leaves = self.leaves(F64)
        logits = self.logits(leaves).detach()
        valid = self.labels != -100
        kept = self.labels.clamp(min=0)
        grad = logits.softmax(1) + torch.eye(logits.shape[1], dtype=F64)[kept]
        grad *= valid.unsqueeze(1) * abs(self.case.logit_scale)
        grad *= 1.0 + logits.abs().amax(1, keepdim=True)
        if self.case.reduction == "mean":
            grad /= max(int(valid.sum()), 1)
        magnitudes = {name: tensor.detach().abs() for name, tensor in leaves.items()}
        names = magnitudes.values()
        for tensor in names:
            tensor.requires_grad_()
        case = Case(softcap=None)
        results = Call(case, magnitudes, None, self.labels).logits(magnitudes)
        grads = torch.autograd.grad(results, list(names), 3.0 * grad)
        by_name = {f"grad {name}": g for name, g in zip(magnitudes, grads, strict=True)}
        return by_name | {"loss": logits.abs().sum() + len(self.labels)}

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return fresh copies of the tensors that require gradients, in their own dtypes or in
        `dtype`."""
        return {
            name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()
            for name, tensor in self.tensors.items()
        }

    def logits(self, leaves: dict[str, Any]) -> Tensor:
        """Return the logits [M, V], as the model computes them."""
        logits = linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        if "lora_a" in leaves:
            x = leaves["hidden"].to(leaves["lora_a"].dtype)
            adapter = linear(linear(x, leaves["lora_a"]), leaves["lora_b"])
            logits = (logits + adapter * 1.5).to(logits.dtype)
        logits = logits * self.case.logit_scale
        if self.case.softcap is not None:
            logits = torch.tanh(logits / self.case.softcap) * self.case.softcap
        return logits


def _results(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(3.0 * loss, list(leaves.values()))
    by_name = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"loss": loss.detach()} | by_name
