"""Adoption: quantise, attach adapters, and make every quantised layer a site of the fused op."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from qlora_compile.adapter_errors import NothingToPackError
from qlora_compile.checkpoint_errors import RepackError, StoredWeightError
from qlora_compile.errors import (
    AlreadyAdaptedError,
    AlreadyQuantizedError,
    MetaDeviceError,
    NoLinearError,
    OffloadedWeightError,
    ShardedWeightError,
    StrictError,
    WeightValueError,
)
from qlora_compile.hf import (
    adapters,
    expert_adapters,
    experts,
    foreign,
    full_training,
    methods,
    parameter_counts,
)
from qlora_compile.hf.bases import fp8_experts
from qlora_compile.hf.bases.base import InPlaceBase, RepackedBase
from qlora_compile.hf.conv1d import LinearSite, as_linear
from qlora_compile.hf.replaced_forward import bind_forward, bound_forwards, is_offloaded
from qlora_compile.hf.saving.save import save_packed
from qlora_compile.kernels.formats.base import BlockSize
from qlora_compile.kernels.formats.errors import OptionWithoutFormatError
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.sites import Inventory, LinearEntry


def check(
    inventory: Inventory,
    lora: object,
    *,
    quantize: str | None,
    options: Mapping[str, Any],
    strict: bool,
) -> list[LinearEntry]:
    """Return the Linears and Conv1Ds to pack, and change nothing.

    options: those of the format `quantize`. Raises whatever error `adopt` would run into."""
    if quantize is not None:
        # Errors that do not depend on any weight.
        format_named(quantize).layout((1, 1), **options)
    model = type(inventory.model).__name__
    sites = inventory.linears or inventory.foreign
    if not sites or isinstance(inventory.model, LinearSite):
        raise NoLinearError(model=model)
    for kind in ("named_parameters", "named_buffers"):
        for prefix, module in inventory.modules.items():
            for name, tensor in getattr(module, kind)(prefix, recurse=False):
                if isinstance(tensor, DTensor):
                    raise ShardedWeightError(site=name, value=tensor.placements)
                if tensor.device.type == "meta":
                    lost = OffloadedWeightError if is_offloaded(module) else MetaDeviceError
                    raise lost(site=name)
    if strict:
        raise_left(
            [
                *((name, e.obstacle or e.other_method) for name, e in inventory.linears.items()),
                *((name, foreign.reason(layer)) for name, layer in inventory.foreign.items()),
            ]
        )
    if lora is not None and adapters.has_adapters(inventory.modules):
        raise AlreadyAdaptedError(model=model)
    if quantize is not None:
        for name, entry in inventory.linears.items():
            if entry.is_quantized:
                kind = type(entry.module).__name__
                raise AlreadyQuantizedError(site=name, kind=kind, value=quantize)
    # PEFT freezes everything but what its config has it train, whatever was trained before.
    trained = inventory.trained
    if lora is not None:
        trained = adapters.check_lora_config(
            inventory.model, inventory.modules, lora, quantize=quantize is not None
        )
    if quantize is None:
        return []
    packed = [entry for entry in inventory.quantizable() if entry.name not in trained]
    if not packed and not experts.packable(inventory.experts, keep_trained=False):
        _raise_unreadable(inventory, quantize)
    for entry in packed:
        methods.refuse(entry.name, entry.method)
        weight = entry.weight
        format_named(quantize).layout((weight.shape[0], weight.shape[1]), **options)
        invalid = weight.numel() - int(weight.detach().isfinite().sum())
        if invalid:
            raise WeightValueError(site=entry.name, count=invalid)
    for name, invalid in experts.check_finite(inventory.experts):
        raise WeightValueError(site=name, count=invalid)
    return packed


def adopt(
    inventory: Inventory,
    lora,
    *,
    packed: Collection[LinearEntry],
    quantize: str | None,
    options: Mapping[str, Any],
) -> Inventory:
    """Quantise the Linears `packed` in place, one by one, let PEFT attach `lora`, quantise experts.

    options: those of the format `quantize`. Returns the inventory of the PeftModel if one was
    made, else the given inventory."""
    keep_trained = lora is not None or inventory.is_partly_frozen
    bound = bound_forwards(inventory.modules.values())
    has_repacked = _repack(inventory)
    if quantize is not None:
        if lora is None and keep_trained:
            _warn_of_trained(inventory)
        for entry in packed:
            linear = as_linear(entry.module)
            replacement = QuantizedLinear.from_linear(linear, quantize, site=entry.name, **options)
            inventory.replace(entry, replacement)
    if lora is not None:
        inventory = Inventory(adapters.attach(inventory.model, lora))
    if quantize is not None:
        # After PEFT, which sizes the experts' adapters by their parameters.
        experts.pack(inventory.experts, quantize, keep_trained=keep_trained, **options)
    if quantize is not None or has_repacked:
        parameter_counts.count_elements(inventory.model, inventory.modules.values())
        save_packed(inventory.modules.values())
    experts.adopt(inventory.experts.values())
    for entry in inventory.linears.values():
        if isinstance(entry.base, InPlaceBase) and entry.obstacle is None:
            entry.base.adopt(entry.module)
    for module in inventory.modules.values():
        adapters.adopt_adapter_layer(module)
        expert_adapters.adopt(module)
    for module in bound:
        bind_forward(module)
    return inventory


def _repack(inventory: Inventory) -> bool:
    """Replace every layer that another library has quantised, and that cannot be adopted in place,
    by a QuantizedLinear or PackedExperts; return whether there were any. Raises RepackError."""
    replaced: set[RepackedBase] = set()
    has_experts = False
    for name, entry in inventory.linears.items():
        base = entry.base
        if isinstance(base, RepackedBase) and entry.obstacle is None:
            try:
                inventory.replace(entry, base.replacement(entry.module))
            except StoredWeightError as error:
                raise RepackError(site=name, **error.fields) from error
            replaced.add(base)
    for base in replaced:
        base.finish(inventory.model)
    for name, site in inventory.experts.items():
        if fp8_experts.recognises(site.module):
            try:
                has_experts |= fp8_experts.adopt(site)
            except StoredWeightError as error:
                raise RepackError(site=name, **error.fields) from error
    return has_experts or bool(replaced)


def format_options(
    quantize: str | None,
    *,
    block_size: BlockSize | None,
    double_quantize: bool,
    **others: Any,
) -> dict[str, Any]:
    """Return the options to give the format `quantize`, unchecked.

    A format without double quantisation gets no such option. Raises UnknownFormatError, and
    OptionWithoutFormatError if there are `others` but no format."""
    if quantize is None:
        for option, value in others.items():
            raise OptionWithoutFormatError(option=option, value=value)
        return {}
    double = double_quantize and format_named(quantize).has_double_quantize
    sized = {} if block_size is None else {"block_size": block_size}
    return {**sized, "double_quantize": double, **others}


def raise_left(sites: Iterable[tuple[str, str | None]]) -> None:
    """Raise StrictError if one of the `sites` is left alone for the reason given with it."""
    left = [f"  {name}: {reason}" for name, reason in sites if reason is not None]
    if left:
        raise StrictError(count=len(left), reasons="\n".join(left))


def _raise_unreadable(inventory: Inventory, quantize: str) -> None:
    """Raise NothingToPackError if there are Linears that another library has quantised."""
    reasons = {name: foreign.reason(layer) for name, layer in inventory.foreign.items()}
    reasons |= {n: e.obstacle for n, e in inventory.linears.items() if e.obstacle is not None}
    for site, reason in reasons.items():
        raise NothingToPackError(
            model=type(inventory.model).__name__, value=quantize, site=site, reason=reason
        )


def _warn_of_trained(inventory: Inventory) -> None:
    kept = [each.weight for each in inventory.quantizable() if each.name in inventory.trained]
    packed = experts.packable(inventory.experts, keep_trained=True)
    others = experts.packable(inventory.experts, keep_trained=False).items()
    kept += [site.weight for name, site in others if name not in packed]
    if kept:
        full_training.warn(kept)
