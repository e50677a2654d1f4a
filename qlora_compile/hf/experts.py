"""Experts: makes transformers' mixture-of-experts layers compute with our op.

The 3-D weights of these layers are not Linears. A class decorated with `use_experts_implementation`
calls the implementation, registered with transformers, that its config names; ours is one. Llama
4's class has no such hook, so its modules become instances of a subclass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations import moe
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from qlora_compile.expert_errors import raise_frozen
from qlora_compile.hf.blocks import is_inside
from qlora_compile.hf.saving.whole_weights import whole_shape
from qlora_compile.kernels.experts.base import PACKED_EXPERTS
from qlora_compile.kernels.experts.op import experts_linear
from qlora_compile.kernels.formats.formats import UNQUANTIZED
from qlora_compile.kernels.layout import Layout
from qlora_compile.modules.experts import PackedExperts

IMPLEMENTATION = "qlora_compile"
"""The name of our implementation in `config._experts_implementation`."""

TRAINED = "the base weight is trained"
_TRAINED_BESIDE = "another parameter of its experts is trained"

Factors = tuple[Tensor, Tensor, Tensor | float]
"""lora_a [E, R, K], lora_b [E, N, R] and the scaling of one weight's adapters."""


@dataclass(frozen=True)
class ExpertSite:
    """The weight `parameter` of an experts module: `experts` times [n, k].

    copied: whether PEFT trains a copy of the module in full.
    """

    module: nn.Module
    parameter: str
    experts: int
    n: int
    k: int
    copied: bool

    @property
    def weight(self) -> nn.Parameter | PackedExperts:
        return getattr(self.module, self.parameter)

    @property
    def format(self) -> str:
        """The name of the format that stores the weight, or the weight's dtype."""
        if isinstance(self.weight, PackedExperts):
            return self.weight.format
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def origin(self) -> str | None:
        """Where a packed weight comes from; None for one that is not quantised."""
        return self.weight.origin if isinstance(self.weight, PackedExperts) else None

    @property
    def obstacle(self) -> str | None:
        """Why transformers computes with the weight, and not our op; None if our op does."""
        if self.copied:
            return "it is trained in full (modules_to_save)"
        reason = _obstacle(self.module)
        return _TRAINED_BESIDE if reason == TRAINED and not self.weight.requires_grad else reason


def sites(modules: Mapping[str, nn.Module]) -> dict[str, ExpertSite]:
    """Return every weight of experts in `modules`, by its name without PEFT's wrappers."""
    found: dict[str, ExpertSite] = {}
    copies, copied = [], []
    for path, module in modules.items():
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies.append(f"{path}.modules_to_save.")
            copied.append(f"{path}.original_module")
        # transformers' classes with experts' weights have such names in all model types.
        is_named = "Expert" in type(module).__name__ and not isinstance(module, PackedExperts)
        if not is_named or path.startswith(tuple(copies)):
            continue
        name = ".".join(p for p in path.split(".") if p not in ("base_layer", "original_module"))
        for parameter in _weight_names(module):
            shape = (1, *whole_shape(getattr(module, parameter)))[-3:]
            n, k = shape[1:] if not is_transposed(module) else shape[:0:-1]
            inside = any(is_inside(path, outer) for outer in copied)
            found[f"{name}.{parameter}"] = ExpertSite(module, parameter, shape[0], n, k, inside)
    return found


def _weight_names(module: nn.Module) -> list[str]:
    if _is_dispatched(module) or isinstance(module, Llama4TextExperts):
        gated = getattr(module, "has_gate", True)
        return ["gate_up_proj" if gated else "up_proj", "down_proj"]
    parameters = module.named_parameters(recurse=False)
    return [n for n, each in parameters if len(whole_shape(each)) > 1 and "bias" not in n]


def is_transposed(module: nn.Module) -> bool:
    """Whether the weights of `module` are [E, K, N], not [E, N, K]."""
    return bool(getattr(module, "is_transposed", isinstance(module, Llama4TextExperts)))


def _is_dispatched(module: nn.Module) -> bool:
    """Whether the forward of `module` is the one that `use_experts_implementation` makes."""
    return getattr(type(module).forward, "__globals__", None) is vars(moe)


def _obstacle(module: nn.Module) -> str | None:
    if not (_is_dispatched(module) or isinstance(module, Llama4TextExperts)):
        return f"{type(module).__name__} computes its experts by code of its own"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several devices"
    for name in _weight_names(module):
        weight = getattr(module, name)
        if isinstance(weight, PackedExperts):
            continue
        if isinstance(weight, DTensor):
            return "its weights are spread over several devices"
        dims = len(whole_shape(weight))
        if dims != 3 or weight.dtype.itemsize < 2 or not weight.is_floating_point():
            return f"its weights are {dims}-dimensional of {weight.dtype}"
    if any(parameter.requires_grad for parameter in module.parameters()):
        return TRAINED
    return None


def check_finite(sites: Mapping[str, ExpertSite]) -> Iterator[tuple[str, int]]:
    """Yield each site whose weight has NaN or infinite values, with their number."""
    for name, site in sites.items():
        if not isinstance(site.weight, PackedExperts) and site.weight.is_floating_point():
            invalid = site.weight.numel() - int(site.weight.detach().isfinite().sum())
            if invalid:
                yield name, invalid


def pack(
    sites: Mapping[str, ExpertSite], format: str, *, keep_trained: bool, **options: Any
) -> None:
    """Pack the weights of all experts that our op can compute, one at a time.

    keep_trained: whether to leave experts with a trained parameter alone; if not, they are packed
    too, and frozen with their biases. options: those of the format.
    """
    for name, site in packable(sites, keep_trained=keep_trained).items():
        packed = PackedExperts.from_parameter(
            getattr(site.module, site.parameter),
            format,
            transposed=is_transposed(site.module),
            site=name,
            **options,
        )
        delattr(site.module, site.parameter)
        settle(site.module, site.parameter, packed)


def settle(module: nn.Module, name: str, packed: PackedExperts) -> None:
    """`place` a packed weight for good: PEFT finds it by its name, and it is frozen."""
    place(module, name, packed)
    # PEFT finds the parameters that it adapts by this method of the module that has them.
    named: Any = partial(_parameters, module)
    named.__func__ = _parameters  # Dynamo takes it for a bound method
    module.named_parameters = named
    module.requires_grad_(False)


def place(module: nn.Module, name: str, packed: PackedExperts) -> None:
    """Let the attribute `name` of an experts module be a packed weight.

    The packed module is registered by another name, because PEFT's `target_modules` may name
    Linears of the same name elsewhere, and PEFT raises if it cannot adapt a module that matches.
    """
    module.add_module(name + PACKED_EXPERTS, packed)
    # Not by setattr, with which nn.Module would register the weight by this name too.
    module.__dict__[name] = packed


def displace(module: nn.Module, name: str) -> None:
    """Remove a packed weight that `place` has put there."""
    del module.__dict__[name]
    delattr(module, name + PACKED_EXPERTS)


def _parameters(
    module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of `module`, and its packed weights by their own names, in the order
    that they had as parameters: PEFT wraps the module once for each."""
    yield from type(module).named_parameters(module, prefix, recurse, remove_duplicate)
    # FSDP2 asks for duplicates, and would move the weight to this name.
    if not recurse and remove_duplicate:
        for name in _weight_names(module):
            if isinstance(packed := getattr(module, name), PackedExperts):
                yield f"{prefix}{'.' if prefix else ''}{name}", packed.weight


def packable(sites: Mapping[str, ExpertSite], *, keep_trained: bool) -> dict[str, ExpertSite]:
    """Return those `sites` that `pack` packs."""
    allowed = (None,) if keep_trained else (None, TRAINED, _TRAINED_BESIDE)
    return {name: site for name, site in sites.items() if site.obstacle in allowed}


def adopt(sites: Iterable[ExpertSite]) -> None:
    """Have our op compute all experts without an obstacle."""
    own_configs: dict[int, Any] = {}
    for site in sites:
        module: Any = site.module
        if site.obstacle is not None or is_served(module):
            continue
        if isinstance(module, Llama4TextExperts):
            module.__class__ = FusedLlama4Experts
            continue
        # A copy, because the model's own config is read by others, and saved.
        shared = id(module.config)
        if shared not in own_configs:
            own_configs[shared] = copy.deepcopy(module.config)
            own_configs[shared]._experts_implementation = IMPLEMENTATION
        module.config = own_configs[shared]


def is_served(module: nn.Module) -> bool:
    """Whether our op computes the experts of `module`."""
    if isinstance(module, FusedLlama4Experts):
        return True
    config: Any = getattr(module, "config", None)
    return _is_dispatched(module) and config._experts_implementation == IMPLEMENTATION


def experts_forward(
    self: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    factors: Mapping[str, Factors] | None = None,
) -> Tensor:
    """Compute the experts of a layer; this is the implementation registered with transformers.

    hidden_states: [T, H]. top_k_index, top_k_weights: [T, top_k], the experts of each token and
    their weights. factors: the adapters' factors, by the weight's name. Returns [T, H]. An index
    past the last expert contributes nothing. No control flow or shape depends on data, so Dynamo
    captures this function without a graph break.
    """
    tokens, top_k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1))
    experts = torch.arange(self.num_experts, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ids, experts, right=True, out_int32=True)
    x = hidden_states.index_select(0, order // top_k)
    x = _linear(self, "gate_up_proj" if self.has_gate else "up_proj", x, offsets, factors)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _linear(self, "down_proj", x, offsets, factors)
    if getattr(self, "has_post_expert_norm", False):  # not in transformers 5.17
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    x = torch.zeros_like(x).index_copy(0, order, x)
    return x.view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


class FusedLlama4Experts(Llama4TextExperts):
    """Llama 4's experts, each of which gets all tokens, already weighted."""

    has_bias = False

    def forward(
        self, hidden_states: Tensor, factors: Mapping[str, Factors] | None = None
    ) -> Tensor:
        """Compute the experts of hidden_states [E * T, H], sorted by expert; return [E * T, H]."""
        rows = hidden_states.shape[0] // self.num_experts
        device = hidden_states.device
        offsets = torch.arange(1, self.num_experts + 1, device=device, dtype=torch.int32) * rows
        gate, up = _linear(self, "gate_up_proj", hidden_states, offsets, factors).chunk(2, dim=-1)
        return _linear(self, "down_proj", up * self.act_fn(gate), offsets, factors)


def _linear(
    module: Any, name: str, x: Tensor, offsets: Tensor, factors: Mapping[str, Factors] | None
) -> Tensor:
    """Multiply x with the weight `name` of each expert, and add bias and adapter.

    All products run in the weight's dtype, with or without autocast, as in transformers'
    grouped_mm. offsets: the end of each expert's rows in x. Raises FrozenExpertsError if the weight
    or the bias requires a gradient.
    """
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    adapter = (factors or {}).get(name)
    if adapter is not None:
        lora_a, lora_b, scaling = adapter
        if not isinstance(scaling, Tensor):
            wide = torch.promote_types(torch.float32, weight.dtype)
            scaling = torch.full((1,), scaling, dtype=wide, device=x.device)
        adapter = (lora_a, lora_b, scaling)
    if bias is not None and bias.requires_grad:
        raise_frozen(f"{type(module).__name__}.{name}_bias")
    if isinstance(weight, PackedExperts):
        if not torch.compiler.is_compiling():
            # A copy that nn.DataParallel makes has children of its own, but shares the attribute.
            weight = getattr(module, name + PACKED_EXPERTS)
        planes, layout = weight.tensors, weight.layout
    else:
        if weight.requires_grad:
            raise_frozen(f"{type(module).__name__}.{name}")
        planes = [weight.transpose(1, 2) if is_transposed(module) else weight]
        experts, n, k = planes[0].shape
        layout = str(Layout(UNQUANTIZED, (experts * n, k)))
    return experts_linear(*(x, offsets, planes, bias, layout), adapter=adapter, dtype=weight.dtype)
