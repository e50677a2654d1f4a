"""The public functions: `load` reads a model, `optimize` compiles it, `explain` reports on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from qlora_compile import adopt, early_builds
from qlora_compile.capture.first_step import FirstStep, ModelLink
from qlora_compile.capture.region_kind import RegionKind
from qlora_compile.capture.regions import Region, RegionSites, install, reinstall, uninstall
from qlora_compile.errors import (
    AlreadyOptimizedError,
    NoExampleInputsError,
    NotOptimizedError,
    OptionError,
)
from qlora_compile.hf import adapters, head_loss, loading, skeleton, trl_head
from qlora_compile.hf.blocks import example_call, is_inside, repeated_blocks, skip_unused_cache
from qlora_compile.hf.probing import left_as_found
from qlora_compile.kernels.formats.base import BlockSize
from qlora_compile.kernels.plans import native as plans
from qlora_compile.report import Report, build_report, regions_of
from qlora_compile.sites import OUTSIDE, Inventory
from qlora_compile.tuning.modes import check_mode
from qlora_compile.verify.head import HeadVerifier
from qlora_compile.verify.verifier import Verifier, Verify, check_option

if TYPE_CHECKING:
    from peft import LoraConfig


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load a model of transformers from a folder, a .gguf file or a Hub name.

    The weights of a quantised checkpoint stay packed, and the package that wrote it is not needed:
    `optimize` takes the model as it is. docs/checkpoints.md lists the kinds that are read.

    dtype: that of the weights that are not packed, and of computation; None for bfloat16 where the
    machine multiplies it natively, else float32. device: where a quantised checkpoint goes. An
    unquantised one, and a .gguf file that has to be decoded, ignore it and stay on the CPU: move
    the model yourself.

    Raises ModelNotFoundError if nothing is there, CheckpointMethodError if nothing here reads that
    kind of checkpoint, CheckpointError, which names file and tensor, if a file is damaged, and
    MissingPackageError for a .gguf file without the package gguf, which the extra "demo" installs.
    No model is left half loaded, and nothing is unpickled.
    """
    source = os.fspath(source)
    return loading.load_model(source, dtype=dtype, device=device, keeps_blocks=True)


def optimize(
    model: nn.Module,
    lora: LoraConfig | None = None,
    *,
    quantize: str | None = None,
    double_quantize: bool = True,
    block_size: BlockSize | None = None,
    strict: bool = False,
    verify: Verify = False,
    scope: Literal["block", "model"] = "block",
    tune: str | os.PathLike[str] = "auto",
    logits_free_loss: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **format_options: Any,
) -> Any:
    """Compile `model` in place: make every frozen Linear, with its LoRA branch, one fused op.

    The same happens to the 3-D weights of mixture-of-experts layers. Returns `model` itself, or the
    PeftModel that PEFT makes of it for `lora`. Compilation happens on the first call of each kind
    of block.

    model: a PreTrainedModel, a PeftModel over plain Linears or bitsandbytes' 4- or 8-bit ones, or
    any nn.Module.

    lora: adapters to attach; None if the model has adapters already or none are wanted.

    quantize: the format to pack the weights of plain Linears and of experts in, layer by layer;
    output heads, tied weights and fully trained modules are not packed. None keeps the weights, and
    adopts those that another library has quantised. Packing freezes a weight. With `lora`, PEFT
    decides which other parameters are trained. Without `lora`, in a model that has adapters or any
    frozen parameter, weights that require a gradient are not packed, and a warning names their
    number and size.

    block_size: for formats in blocks, the number of elements that share a scale, a power of two
    from 32 to 4096, or "row"; None for 64.

    double_quantize: quantise the scales too (QLoRA, Dettmers et al. 2023). A format without this,
    such as 8-bit integers, keeps its scales as they are.

    strict: raise StrictError, with all reasons, if a quantised or adapted Linear or a weight of
    experts is not fused.

    verify: check outputs and all gradients of each rewritten graph, and of what Inductor makes of
    the graph, against a float64 evaluation of the captured graph, on the first real inputs and on
    random ones; with logits_free_loss the loss, too. Errors are judged by those that the captured
    graph makes in its own dtypes. A graph that passes gets a certificate, in the report and in the
    cache folder. On a mismatch the captured graph runs and the report says so; if strict,
    VerificationError is raised. "once" skips the check if a certificate is stored for the same
    graph, kernels and versions.

    scope: compile each repeated block, or the whole model as one region.

    tune: what chooses the variant of every fused op. "auto": records of earlier measurements in the
    cache folder; problems without a record are measured on first use, for about a minute in all,
    and recorded. "off": the same records, without measuring. "model": the cost model. A path: the
    records of that file or folder. The cost model chooses wherever there is no record.

    logits_free_loss: compute a causal LM's loss in training without its logits, the largest tensors
    of a step. A call in training mode with labels=, and without logits_to_keep, then returns the
    model's own output with the loss and without logits; all other calls are as before. The model is
    first called twice on small inputs, and LogitsFreeLossError is raised if it does something
    unknown to its logits, or if its loss would differ.

    example_inputs: keyword arguments of `model` for the calls that strict and logits_free_loss
    need; required if `model` is not a PreTrainedModel with dummy inputs.

    checkpoint: a folder or Hub name to load the weights of `model` from, which then is a
    transformers model on the meta device. Each weight is packed as soon as it is read, so that the
    whole model is never in memory unpacked. Here an error about adapters leaves the model loaded.

    format_options: the other options of the format, such as group_size=128 of 4-bit integers.

    Calls in training mode or with labels build no key-value cache, unless use_cache=True is given.
    That changes how transformers treats several sequences packed in one row, whose position_ids
    start again at each sequence: without a cache it keeps the sequences apart, with one, its
    default, they attend to one another.

    A model that has been optimised may be optimised again when it has changed since, or to attach
    adapters or quantise weights later; AlreadyOptimizedError is raised if there is nothing to do.
    Other values of strict, verify, tune or logits_free_loss are no such change: pass them in the
    first call.

    Raises a QloraCompileError for every bad argument, before anything is changed. A StrictError, or
    a LogitsFreeLossError about an adapter that `lora` puts on the head, leaves the model quantised
    and adapted but uncompiled. Errors about stored values come while weights are packed, layer by
    layer, and leave the layers before packed: errors of scales that are too large for their dtype,
    WeightShapeError, and RepackError for another library's tensors. A model that was optimised
    before stays compiled.
    """
    if scope not in ("block", "model"):
        raise OptionError(option="scope", value=scope, known="'block', 'model'")
    chosen = adopt.format_options(
        quantize, block_size=block_size, double_quantize=double_quantize, **format_options
    )
    verify = check_option(verify)
    if checkpoint is not None:
        check_mode(tune)
        skeleton.fill(model, checkpoint, quantize, chosen)
        quantize, chosen = None, {}
    inventory = Inventory(model)
    early_builds.start(inventory, quantize, chosen, tune)
    # On a new machine this takes a second, in which the builds go on.
    tune = check_mode(tune)
    installed = regions_of(inventory)
    packs = quantize is not None and bool(inventory.quantizable())
    if (
        installed
        and lora is None
        and not packs
        and not any(region.displaced for region in installed.values())
        and _planned(inventory, scope)
        == {name: region.planned for name, region in installed.items()}
    ):
        raise AlreadyOptimizedError(model=type(model).__name__)
    options: Any = {"quantize": quantize, "options": chosen}
    blocks = repeated_blocks(inventory.modules) if scope == "block" else []
    packed = adopt.check(inventory, lora, **options, strict=strict)
    if strict:
        _example_inputs(model, example_inputs)
    if logits_free_loss:
        head_loss.check(model, whole=not blocks, example_inputs=example_inputs)
    for region in installed.values():
        uninstall(region.module)
    try:
        inventory = adopt.adopt(inventory, lora, packed=packed, **options)
    except BaseException:
        for region in installed.values():
            reinstall(region)
        raise
    model = inventory.model
    hooks = None
    if logits_free_loss:
        name = f"the loss of {type(adapters.base_model(model)).__name__}"
        verifier = HeadVerifier(name, strict, verify == "once") if verify else None
        hooks = head_loss.LogitsFreeLoss(model, verifier)
    plans.start()
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
    """Report what became of every Linear and every weight of experts of an optimised model.

    If blocks have not run yet, one call captures them without compiling, with `example_inputs`
    (keyword arguments of the model) or else with the model's own dummy inputs. If it has none,
    their sites are reported as not run yet. Raises NotOptimizedError if `model` is not optimised.
    """
    inventory = Inventory(model)
    regions = regions_of(inventory).values()
    if not regions:
        raise NotOptimizedError(model=type(model).__name__)
    inputs = example_inputs or example_call(adapters.base_model(model))
    if inputs is not None and any(region.graphs is None for region in regions):
        real = [(r, r.graphs, r.uncompiled) for r in regions if r.graphs is not None]
        try:
            _probe(model, regions, inputs)
        finally:
            for region, graphs, uncompiled in real:
                region.graphs, region.uncompiled = graphs, uncompiled
    return build_report(inventory)


def _example_inputs(model: nn.Module, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    inputs = given or example_call(adapters.base_model(model))
    if inputs is None:
        raise NoExampleInputsError(model=type(model).__name__)
    return inputs


def _planned(inventory: Inventory, scope: str) -> dict[str, RegionSites]:
    """Return the modules to compile by name, each with its sites."""
    modules = inventory.modules
    base = adapters.base_model(inventory.model)
    root = next(name for name, module in modules.items() if module is base)
    linears = {n: each for n, each in inventory.linears.items() if is_inside(n, root)}
    reasons = {n: each.left_alone for n, each in linears.items()}
    reasons |= {n: each.obstacle for n, each in inventory.experts.items()}
    served = {name for name, reason in reasons.items() if reason is None}
    repeated = repeated_blocks(modules) if scope == "block" else []
    blocks = [b for b in repeated or [root] if _inside(b, served)]
    outside = {n: e for n, e in linears.items() if not any(is_inside(n, b) for b in blocks)}
    # A Linear outside the blocks gets its own region if it is quantised or adapted, or if no block
    # has a site. Any other gets a region that runs compiled only in calls for which torch is slow.
    singles = [
        name
        for name, entry in outside.items()
        if name in served and (not blocks or entry.is_quantized or entry.adapted)
    ]
    planned = {}
    for block in [*blocks, *singles] or [root]:
        local = _inside(block, reasons)
        kept = {path: why for name, path in local.items() if (why := reasons[name]) is not None}
        planned[block] = RegionSites(frozenset(local.values()), kept)
    for name, entry in outside.items():
        if name not in planned and entry.may_be_slow:
            planned[name] = RegionSites(frozenset({""}), {}, entry.kept or OUTSIDE)
    return planned


def _install_regions(
    inventory: Inventory, *, strict: bool, verify: Verify, scope: str, tune: str
) -> list[Region]:
    if strict:
        adopt.raise_left((name, each.obstacle) for name, each in inventory.experts.items())
    planned = _planned(inventory, scope)
    blocks = repeated_blocks(inventory.modules)
    count = Counter(type(inventory.modules[name]) for name in planned if name in blocks)
    kinds: dict[type, RegionKind] = {}
    regions = []
    for name, sites in planned.items():
        module = inventory.modules[name]
        key = type(module)
        if key not in kinds:
            verifier = Verifier(key.__name__, strict, verify == "once") if verify else None
            kinds[key] = RegionKind(key, strict, verifier, count[key] > 1, tune)
        regions.append(install(module, kinds[key], sites))
    first_step = FirstStep(trl_head.serve)
    ModelLink.make(adapters.base_model(inventory.model), first_step)
    for region in regions:
        region.first_step = first_step
    return regions


def _inside(block: str, names: Collection[str]) -> dict[str, str]:
    """Return those `names` that are at or inside `block`, each with its path inside `block`."""
    return {n: n[len(block) :].lstrip(".") for n in names if is_inside(n, block)}


def _probe(model: nn.Module, regions: Iterable[Region], inputs: Mapping[str, Any]) -> None:
    """Call the model once, with its regions captured and rewritten but not compiled.

    The call is in training mode, so that graphs contain dropout; the state is restored afterwards.
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
