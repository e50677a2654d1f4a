"""The contenders: the same model and adapters, each the way its users train it."""

from __future__ import annotations

# What only some contenders need is not installed beside the others.
# pyright: reportMissingImports=false
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import qlora_compile
from bench.peers.floor import Floor
from bench.peers.settings import ALPHA, DEVICE, Setting
from bench.stock import with_bitsandbytes

OURS, STOCK, STOCK_COMPILED = "qlora_compile", "PEFT + bnb", "PEFT + bnb, compiled"
UNQUANTISED, FLOOR = "PEFT, unquantised", "floor"


@dataclass(frozen=True)
class Contender:
    """build: of the plain model. needs: a package that has to be installed. family: losses of one
    family, which share the base weights' rounding, have to agree."""

    name: str
    build: Callable[[Any, Setting], Any]
    family: str = "nf4"
    needs: str | None = None

    @property
    def missing(self) -> bool:
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


def lora(setting: Setting, modules: set[str] | None = None) -> LoraConfig:
    return LoraConfig(
        r=setting.rank, lora_alpha=ALPHA, target_modules=list(modules or ()) or "all-linear"
    )


def _ours(model: Any, setting: Setting) -> Any:
    return qlora_compile.optimize(model, lora(setting), quantize="nf4", logits_free_loss=True)


def _stock(model: Any, setting: Setting) -> Any:
    return get_peft_model(with_bitsandbytes(model, 4), lora(setting))


def _compiled(model: Any, setting: Setting) -> Any:
    return torch.compile(_stock(model, setting))


def _unquantised(model: Any, setting: Setting) -> Any:
    return get_peft_model(model, lora(setting))


def _torchao(model: Any, setting: Setting) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and module is not head,
    )
    # What PEFT asks of a model that transformers quantised itself.
    model.hf_quantizer = None
    return get_peft_model(model, lora(setting))


def _hqq(model: Any, setting: Setting) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    replaced = set()
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and linear is not model.get_output_embeddings():
            parent, _, leaf = name.rpartition(".")
            layer = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device=DEVICE)
            setattr(model.get_submodule(parent), leaf, layer)
            replaced.add(leaf)
    # "all-linear" does not see HQQ's layers.
    return get_peft_model(model, lora(setting, replaced))


CONTENDERS = {
    each.name: each
    for each in (
        Contender(OURS, _ours),
        Contender(STOCK, _stock),
        Contender(STOCK_COMPILED, _compiled),
        Contender(UNQUANTISED, _unquantised, family="none"),
        Contender("PEFT + torchao int8", _torchao, family="int8", needs="torchao"),
        Contender("PEFT + HQQ", _hqq, family="hqq", needs="hqq"),
        Contender(FLOOR, Floor, family="floor"),
    )
}
