"""The user's one line: `optimize(model)`, and the report of what it did."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from qlora_compile import adopt
from qlora_compile.capture.regions import (
    Region,
    RegionKind,
    install,
    uninstall,
)
from qlora_compile.errors import (
    AlreadyOptimizedError,
    NoExampleInputsError,
    NotOptimizedError,
    OptionError,
)
from qlora_compile.hf import adapters, head_loss
from qlora_compile.hf.blocks import example_call, is_inside, repeated_blocks, skip_unused_cache
from qlora_compile.hf.probing import left_as_found
from qlora_compile.kernels.formats.base import USUAL_BLOCK_SIZE, BlockSize
from qlora_compile.report import Report, build_report, regions_of
from qlora_compile.sites import Inventory
from qlora_compile.tuning.modes import check_mode
from qlora_compile.verify.verifier import Verifier, Verify, check_option

if TYPE_CHECKING:
    from peft import LoraConfig


def optimize(
    model: nn.Module,
    lora: LoraConfig | None = None,
    *,
    quantize: str | None = None,
    double_quantize: bool = True,
    block_size: BlockSize = USUAL_BLOCK_SIZE,
    strict: bool = False,
    verify: Verify = False,
    scope: Literal["block", "model"] = "block",
    tune: str | os.PathLike[str] = "auto",
    logits_free_loss: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
) -> Any:
    """Compiles `model` in place so that every frozen Linear, with its LoRA branch, is one fused op,
    and so are the 3-D weights of mixture-of-experts layers.

    model: a PreTrainedModel, a PeftModel over plain Linears or bitsandbytes' 4- or 8-bit ones, or
    any nn.Module. Returns the object itself, or the PeftModel PEFT made of it for `lora`.

    lora: adapters to attach; None when they are there already or none are wanted.
    quantize: the format plain Linears are packed in, layer by layer (output heads, tied weights and
    fully trained modules stay) and so are the weights of experts; None keeps or adopts what is
    there. Packing freezes a weight. Where `lora` is given, PEFT's rule says what else is trained.
    Without it, in a model that has adapters or any frozen parameter, a weight that is trained stays
    as it is, and a warning tells of it.
    block_size: elements that share a scale, for the shipped formats a power of two from 32 to 4096,
    or "row". double_quantize: quantise the scales too (QLoRA, Dettmers et al. 2023); a format that
    has no such form, as 8-bit integers, keeps float32 scales.
    strict: raise StrictError, with all reasons, when a quantised or adapted Linear or a weight of
    experts is not fused.
    verify: check outputs and all gradients of each rewritten graph, on its first real inputs and on
    random ones, against a float64 evaluation of the captured one, and next to the errors that one
    makes in its own dtypes. What passes has a certificate, in the report and in the cache folder;
    on a mismatch the original runs and the report says so, or, if strict, VerificationError is
    raised. "once": a certificate stored for the same graph, kernels and versions stands for it.
    scope: compile each repeated block, or the whole model as one region.
    tune: how the implementation of every fused op is chosen. "auto": by records of earlier
    measurements in the cache folder; what has none is measured on first use, for about a minute,
    and remembered. "off": by the same records, but nothing is measured. "model": by the cost model
    alone. A path: by the records of that file or folder. What has no record is modelled.
    logits_free_loss: take a causal LM's loss in training without making its logits, the largest
    tensors of a step. A call in training mode with labels=, and without logits_to_keep, returns
    the model's own output with the loss and without logits; every other call is as before. The
    model is first called twice on small inputs, and refused (LogitsFreeLossError) if it does
    something unknown to its logits or its loss would differ.
    example_inputs: keyword arguments of `model`, needed by strict and logits_free_loss where the
    model is not a PreTrainedModel that knows inputs of its own.

    Calls in training mode or with labels build no key-value cache, unless use_cache=True is given.
    transformers then keeps sequences apart that lie packed in one row, with position_ids that start
    again at each of them; with a cache, as by its default, they attend to one another.

    Compilation happens on the first call of each kind of block. Raises a QloraCompileError, before
    anything is changed, for every bad argument; a StrictError, or a LogitsFreeLossError about what
    `lora` puts on the head, leaves the model quantised and adapted but uncompiled.
    """
    if scope not in ("block", "model"):
        raise OptionError(option="scope", value=scope, known="'block', 'model'")
    inventory = Inventory(model)
    if regions_of(inventory):
        raise AlreadyOptimizedError(model=type(model).__name__)
    tune = check_mode(tune)
    verify = check_option(verify)
    options: Any = {
        "quantize": quantize,
        "block_size": block_size,
        "double_quantize": double_quantize,
    }
    blocks = repeated_blocks(inventory.modules) if scope == "block" else []
    packed = adopt.check(inventory, lora, **options, strict=strict, whole=not blocks)
    if strict:
        _example_inputs(model, example_inputs)
    if logits_free_loss:
        head_loss.check(model, whole=not blocks, example_inputs=example_inputs)
    inventory = adopt.adopt(inventory, lora, packed=packed, **options)
    model = inventory.model
    hooks = head_loss.LogitsFreeLoss(model) if logits_free_loss else None
    regions = _install_regions(inventory, strict=strict, verify=verify, scope=scope, tune=tune)
    cache_hook = skip_unused_cache(model, inventory.modules)
    if strict:
        try:
            _probe(model, regions, _example_inputs(model, example_inputs))
        except BaseException:
            if cache_hook is not None:
                cache_hook.remove()
            if hooks is not None:
                hooks.remove()
            for region in regions:
                uninstall(region.module)
            raise
    return model


def explain(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> Report:
    """What became of every Linear of an optimised model.

    Blocks that have not run yet are captured, not compiled, by one call with `example_inputs`
    (keyword arguments of the model) or with small inputs of the model's own; where there are none,
    their sites are reported as not run yet. Raises NotOptimizedError.
    """
    inventory = Inventory(model)
    regions = regions_of(inventory).values()
    if not regions:
        raise NotOptimizedError(model=type(model).__name__)
    inputs = example_inputs or example_call(adapters.base_model(model))
    if inputs is not None and any(region.graphs is None for region in regions):
        real = [(region, region.graphs) for region in regions if region.graphs is not None]
        try:
            _probe(model, regions, inputs)
        finally:
            for region, graphs in real:
                region.graphs = graphs
    return build_report(inventory)


def _example_inputs(model: nn.Module, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    inputs = given or example_call(adapters.base_model(model))
    if inputs is None:
        raise NoExampleInputsError(model=type(model).__name__)
    return inputs


def _install_regions(
    inventory: Inventory, *, strict: bool, verify: Verify, scope: str, tune: str
) -> list[Region]:
    modules = inventory.modules
    if strict:
        adopt.raise_left((name, each.obstacle) for name, each in inventory.experts.items())
    base = adapters.base_model(inventory.model)
    root = next(name for name, module in modules.items() if module is base)
    linears = {n: each for n, each in inventory.linears.items() if is_inside(n, root)}
    reasons = {n: each.left_alone for n, each in linears.items()}
    reasons |= {n: each.obstacle for n, each in inventory.experts.items()}
    served = {name for name, reason in reasons.items() if reason is None}
    repeated = repeated_blocks(modules) if scope == "block" else []
    blocks = [b for b in repeated or [root] if _inside(b, served)]
    covered = {name for block in blocks for name in _inside(block, served)}
    # What stands outside the blocks is worth a region of its own if it is quantised or adapted, or
    # if the blocks have nothing.
    singles = [
        name
        for name, entry in linears.items()
        if name in served
        and name not in covered
        and (not blocks or entry.is_quantized or entry.adapted)
    ]
    kinds: dict[type, RegionKind] = {}
    regions = []
    for block in [*blocks, *singles] or [root]:
        module = modules[block]
        key = type(module)
        if key not in kinds:
            is_repeated = sum(type(modules[b]) is key for b in blocks) > 1
            verifier = Verifier(key.__name__, strict, verify == "once") if verify else None
            kinds[key] = RegionKind(key, strict, verifier, is_repeated, tune)
        local = _inside(block, reasons)
        kept = {path: why for name, path in local.items() if (why := reasons[name]) is not None}
        regions.append(install(module, kinds[key], frozenset(local.values()), kept))
    return regions


def _inside(block: str, names: Collection[str]) -> dict[str, str]:
    """The `names` at or below `block`, each with its path inside it."""
    return {n: n[len(block) :].lstrip(".") for n in names if is_inside(n, block)}


def _probe(model: nn.Module, regions: Iterable[Region], inputs: Mapping[str, Any]) -> None:
    """Calls the model once with its regions captured and rewritten but not compiled.

    Training mode, so that dropout is in the graphs; buffers and random state are put back.
    """
    kinds = {id(region.kind): region.kind for region in regions}.values()
    for kind in kinds:
        kind.probing = True
    try:
        with left_as_found(model), torch.enable_grad():
            model.train()
            model(**inputs)
    finally:
        for kind in kinds:
            kind.probing = False
