"""Measures how far two runs of one training step are apart, and makes a twin in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bench.stock import with_bitsandbytes, without_repacking
from qlora_compile.modules.linear import QuantizedLinear


def training_step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Loss [1], logits and the gradient of every trained parameter, in float32."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    results = {"loss": output.loss.detach()[None], "logits": output.logits.detach()}
    results |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.float() for name, value in results.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Return the distance, relative to the norm of `other`, per group: loss, logits, the gradients
    of all lora_A, of all lora_B, and of all biases or other parameters of one name."""
    assert one.keys() == other.keys()
    groups: dict[str, list[str]] = {}
    for name in one:
        group = name if name in ("loss", "logits") else name.rsplit(".", 2)[0].rsplit(".", 1)[-1]
        groups.setdefault(group, []).append(name)
    distances = {}
    for group, names in groups.items():
        left = torch.cat([one[name].flatten() for name in names])
        right = torch.cat([other[name].flatten() for name in names])
        distances[group] = float((left - right).norm() / right.norm())
    return distances


class Errors:
    """Errors of two models against a float32 run, each the root mean square over the batches."""

    def __init__(self) -> None:
        self.squares: dict[str, list[tuple[float, float]]] = {}

    def add(
        self, ours: dict[str, Tensor], stock: dict[str, Tensor], exact: dict[str, Tensor]
    ) -> None:
        theirs = distance(stock, exact)
        for group, mine in distance(ours, exact).items():
            self.squares.setdefault(group, []).append((mine**2, theirs[group] ** 2))

    def by_group(self) -> dict[str, tuple[float, float]]:
        """Return ours and stock's errors per group."""
        means = {
            group: [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
            for group, pairs in self.squares.items()
        }
        return {group: (mine**0.5, theirs**0.5) for group, (mine, theirs) in means.items()}


def stock_twin(base: Any, adapter: Path) -> Any:
    """Stock PEFT over bitsandbytes' NF4 of `base`, with a saved adapter to train on."""
    model = without_repacking(with_bitsandbytes(copy.deepcopy(base), 4))
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True).train()


def float32_twin(base: Any, ours: nn.Module, adapter: Path) -> Any:
    """Stock PEFT over `base` in float32 with the weights that `ours` decodes."""
    model = PeftModel.from_pretrained(
        copy.deepcopy(base).float(), str(adapter), is_trainable=True
    ).train()
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            model.get_submodule(name).weight.data = module.dequantize(torch.float32)
    return model
