"""The structure of transformers' models: repeated blocks, heads, tied weights, caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def own_forward(module_class: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward of a module's class, without transformers' checkpointing around it."""
    forward: Any = module_class.forward
    # Older versions of transformers checkpoint in __call__, not around the forward.
    while getattr(forward, "__code__", None) and (
        forward.__code__.co_name == "forward_with_checkpointing"
    ):
        forward = forward.__wrapped__
    return forward


def checkpoints(module: nn.Module) -> bool:
    """Whether the forward of the block's class would checkpoint now; `own_forward` never does."""
    return (
        isinstance(module, GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and module.training
        and own_forward(type(module)) is not type(module).forward
    )


def is_cached_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block is called with a key-value cache, as in generation."""
    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))


def is_inside(name: str, outer: str) -> bool:
    """Whether the module named `name` is the module named `outer`, or inside that."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def repeated_blocks(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the blocks that a model repeats; empty if there are none.

    The blocks are transformers' outermost checkpointing layers. Without any, they are the modules
    of the classes that a model of diffusers declares, or of the class that the longest list
    consists of, wherever they stand in such lists. A list is a ModuleList or Sequential of modules
    of one class; those that hold Linears come first.
    """
    blocks: list[str] = []
    for name, module in modules.items():
        is_block = isinstance(module, GradientCheckpointingLayer)
        if is_block and not (blocks and is_inside(name, blocks[-1])):
            blocks.append(name)
    if blocks:
        return blocks
    declared = {
        n for each in modules.values() for n in getattr(each, "_repeated_blocks", None) or ()
    }
    if declared:
        return [name for name, module in modules.items() if type(module).__name__ in declared]
    lists = [
        list(module)
        for module in modules.values()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(child) for child in module}) == 1
        and not isinstance(module[0], nn.Linear | BaseTunerLayer)
    ]
    with_linears = [
        each for each in lists if any(isinstance(inner, nn.Linear) for inner in each[0].modules())
    ]
    longest = max(with_linears or lists, key=len, default=[])
    if len(longest) < 2:
        return []
    names = {id(module): name for name, module in modules.items()}
    return [
        names[id(child)] for each in lists if type(each[0]) is type(longest[0]) for child in each
    ]


def kept_linears(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the Linears that are never quantised, and not fused unless adapted: site → reason.

    modules: every module under each of its names.
    """
    reasons: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in modules.items():
        # Not module.weight: an adapter layer also shows its base's weight under that name.
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        first = owners.setdefault(id(weight), name)
        if first != name:
            for tied, other in ((name, first), (first, name)):
                if isinstance(modules[tied], nn.Linear):
                    reasons[_site(tied)] = f"its weight is tied to {other}"
    for name, reason in _head_linears(modules).items():
        reasons.setdefault(_site(name), reason)
    return reasons


def _pretrained(modules: Mapping[str, nn.Module]) -> dict[str, PreTrainedModel]:
    """Return transformers' models by their names, the outermost first."""
    return {name: each for name, each in modules.items() if isinstance(each, PreTrainedModel)}


def _site(name: str) -> str:
    """Return the site of a Linear: its name, or that of the adapter layer around it."""
    return name.removesuffix(".base_layer")


def full_precision_linears(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the sites of Linears that transformers always keeps in float32."""
    found = set()
    for prefix, inner in _pretrained(modules).items():
        kept = {*(inner._keep_in_fp32_modules or ()), *(inner._keep_in_fp32_modules_strict or ())}
        found |= {
            _site(name)
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
            and is_inside(name, prefix)
            and not kept.isdisjoint(name.split("."))
        }
    return found


def skip_unused_cache(model: nn.Module, modules: Mapping[str, nn.Module]) -> RemovableHandle | None:
    """Hook `model` so that calls in training mode or with labels build no key-value cache.

    transformers' decoders build a cache by default, even in training, and blocks do not run
    compiled with one. A caller's own `use_cache` is respected. Returns the hook; None if the model
    takes no `use_cache`, or has the hook already.
    """
    pretrained = _pretrained(modules)
    if not pretrained:
        return None
    prefix, inner = next(iter(pretrained.items()))
    if not _takes_use_cache([each for n, each in pretrained.items() if is_inside(n, prefix)]):
        return None
    # A PeftModel may call the inner model's forward directly, where hooks do not run. It passes
    # keywords on, so it is hooked itself.
    direct = isinstance(model, PeftModel) and model.get_base_model() is inner
    caller = model if direct else inner
    if _without_cache in caller._forward_pre_hooks.values():
        return None
    return caller.register_forward_pre_hook(_without_cache, with_kwargs=True)


def _takes_use_cache(models: list[PreTrainedModel]) -> bool:
    """Whether the first model takes `use_cache`, by name or by passing keywords to an inner model.

    `models`: a model and those inside it. LLaVA and GraniteMoE no longer take it by name.
    """
    outer, *inner = (inspect.signature(type(each).forward).parameters for each in models)
    hands_on = any(p.kind is p.VAR_KEYWORD for p in outer.values())
    return "use_cache" in outer or (hands_on and any("use_cache" in each for each in inner))


def _without_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if module.training or kwargs.get("labels") is not None:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def example_call(model: nn.Module) -> dict[str, Any] | None:
    """Return small inputs to call the model with, None if `model` is not a PreTrainedModel."""
    if not isinstance(model, PreTrainedModel):
        return None
    inputs = dict(model.dummy_inputs)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    for name, value in inputs.items():
        if name.endswith("input_ids") and vocabulary:
            inputs[name] = value % vocabulary
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _head_linears(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the Linears outside the body of the outermost of transformers' models, with reasons.

    That is its output head, and every Linear beside the body.
    """
    prefix, model = next(iter(_pretrained(modules).items()), ("", None))
    if model is None:
        return {}
    head = model.get_output_embeddings()
    body = f"{prefix}.".lstrip(".") + model.base_model_prefix
    has_body = isinstance(getattr(model, model.base_model_prefix, None), nn.Module)
    reasons = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or not is_inside(name, prefix):
            continue
        if module is head:
            reasons[name] = "it is the output head, kept in full precision"
        elif has_body and not is_inside(name, body):
            reasons[name] = "it belongs to the head, kept in full precision"
    return reasons
