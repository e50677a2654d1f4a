"""The contenders: the same model and adapters, each the way its users train it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import qlora_compile
from bench.device.carried import CARRIED
from bench.peers.floor import Floor
from bench.peers.settings import ALPHA, EXPERTS, Setting
from bench.peers.with_unsloth import ENVIRONMENT, unsloth
from bench.stock import with_bitsandbytes

OURS, STOCK, STOCK_COMPILED = "qlora_compile", "PEFT + bnb", "PEFT + bnb, compiled"
UNQUANTISED, FLOOR, TORCH_FLOOR = (
    "PEFT, unquantised",
    "floor",
    "floor of torch's attention and head",
)
UNSLOTH, UNSLOTH_GRAPHS = "Unsloth", "Unsloth, CUDA graphs of blocks"

NEEDS_GPU = (UNSLOTH, UNSLOTH_GRAPHS)


@dataclass(frozen=True)
class Contender:
    """One way to train. build: makes the contender from the plain model. family: losses in a
    family, which have the same rounding of the base weights, must agree. needs: a package that must
    be installed, or be in one of `folders`, which only this contender has on its path. module,
    environment: what its process runs, and with which variables. without_target: whether no target
    names it, so that its process is ended first if memory is short."""

    name: str
    build: Callable[[Any, Setting], Any]
    family: str = "nf4"
    needs: str | None = None
    folders: tuple[Path, ...] = ()
    module: str = "bench.peers.worker"
    environment: Mapping[str, str] = field(default_factory=dict)
    without_target: bool = False

    @property
    def missing(self) -> bool:
        if self.needs is None or any((each / self.needs).exists() for each in self.folders):
            return False
        return importlib.util.find_spec(self.needs) is None


def lora(setting: Setting, modules: set[str] | None = None) -> LoraConfig:
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    return LoraConfig(
        r=setting.rank,
        lora_alpha=ALPHA,
        lora_dropout=setting.dropout,
        target_modules=list(modules or ()) or "all-linear",
        target_parameters=experts if setting.model == EXPERTS else None,
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
            layer = HQQLinear(
                linear, config, compute_dtype=linear.weight.dtype, device=setting.device
            )
            setattr(model.get_submodule(parent), leaf, layer)
            replaced.add(leaf)
    # "all-linear" does not see HQQ's layers.
    return get_peft_model(model, lora(setting, replaced))


_BITSANDBYTES: Any = {"needs": "bitsandbytes", "folders": (CARRIED / "bitsandbytes",)}
_UNSLOTH: Any = {
    "needs": "unsloth",
    "folders": (CARRIED / "unsloth", CARRIED / "bitsandbytes"),
    "module": "bench.peers.unsloth_worker",
    "environment": ENVIRONMENT,
}

CONTENDERS = {
    each.name: each
    for each in (
        Contender(OURS, _ours),
        Contender(STOCK, _stock, **_BITSANDBYTES),
        Contender(STOCK_COMPILED, _compiled, **_BITSANDBYTES),
        Contender(UNQUANTISED, _unquantised, family="none"),
        Contender(
            "PEFT + torchao int8", _torchao, family="int8", needs="torchao", without_target=True
        ),
        Contender("PEFT + HQQ", _hqq, family="hqq", needs="hqq", without_target=True),
        Contender(FLOOR, partial(Floor, ours=True), family="floor"),
        Contender(TORCH_FLOOR, Floor, family="floor"),
        Contender(UNSLOTH, unsloth, **_UNSLOTH),
        replace(
            Contender(UNSLOTH_GRAPHS, unsloth, **_UNSLOTH),
            environment=ENVIRONMENT | {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"},
        ),
    )
}
