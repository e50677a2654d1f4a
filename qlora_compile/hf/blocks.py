"""The structure of a model as transformers builds it: repeated blocks, heads, tied weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def own_forward(module_class: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a module's class, without the checkpointing transformers wraps around it."""
    forward: Any = module_class.forward
    # Older transformers checkpoint in __call__, which is outside the forward already.
    while getattr(forward, "__code__", None) and (
        forward.__code__.co_name == "forward_with_checkpointing"
    ):
        forward = forward.__wrapped__
    return forward


def checkpoints(module: nn.Module) -> bool:
    """Whether the class's forward would checkpoint the block now, as `own_forward` does not."""
    return (
        isinstance(module, GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and module.training
        and own_forward(type(module)) is not type(module).forward
    )


def is_cached_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block is called with a key-value cache, as in generation."""
    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules a model repeats: transformers' checkpointing layers, else the children of the
    longest ModuleList of one class; outermost only, empty if there is neither."""
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            blocks.append(module)
            inside.update(id(child) for child in module.modules())
    if blocks:
        return blocks
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    longest = max(lists, key=len, default=[])
    return longest if len(longest) > 1 else []


def kept_linears(model: nn.Module) -> dict[str, str]:
    """Linears never quantised, and left alone unless an adapter targets them: site → reason."""
    reasons: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # Its own: an adapter layer shows its base's as `weight` too.
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        first = owners.setdefault(id(weight), name)
        if first != name:
            for tied, other in ((name, first), (first, name)):
                if isinstance(model.get_submodule(tied), nn.Linear):
                    reasons[_site(tied)] = f"its weight is tied to {other}"
    for prefix, inner in model.named_modules():
        if isinstance(inner, PreTrainedModel):
            path = f"{prefix}." if prefix else ""
            for name, reason in _head_linears(inner).items():
                reasons.setdefault(_site(path + name), reason)
            break
    return reasons


def _site(name: str) -> str:
    """The name a Linear goes by: its adapter layer's where PEFT has wrapped it."""
    return name.removesuffix(".base_layer")


def full_precision_linears(model: nn.Module) -> dict[str, str]:
    """Linears transformers keeps in float32 whatever the model's dtype: name → reason."""
    reasons = {}
    for prefix, inner in model.named_modules():
        if isinstance(inner, PreTrainedModel):
            kept = {
                *(inner._keep_in_fp32_modules or ()),
                *(inner._keep_in_fp32_modules_strict or ()),
            }
            for name, module in inner.named_modules(prefix=prefix):
                if isinstance(module, nn.Linear) and not kept.isdisjoint(name.split(".")):
                    reasons[_site(name)] = "transformers keeps its weight in float32"
    return reasons


def skip_unused_cache(model: nn.Module) -> RemovableHandle | None:
    """Lets `model` build no key-value cache in calls that have no use for one; None if it has none.

    transformers' decoders build one by default, in training too, and blocks do not run compiled
    with a cache. A caller's own `use_cache` is respected.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None or not _takes_use_cache(inner):
        return None
    # A PeftModel may call the forward of the model inside, past its hooks; it passes keywords on.
    direct = isinstance(model, PeftModel) and model.get_base_model() is inner
    caller = model if direct else inner
    return caller.register_forward_pre_hook(_without_cache, with_kwargs=True)


def _takes_use_cache(model: PreTrainedModel) -> bool:
    """Whether a forward names `use_cache`, or hands keywords on to a model inside that does: LLaVA
    and GraniteMoE name it no more."""
    parameters = inspect.signature(type(model).forward).parameters
    if "use_cache" in parameters:
        return True
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and any(
        "use_cache" in inspect.signature(type(inner).forward).parameters
        for inner in model.modules()
        if isinstance(inner, PreTrainedModel)
    )


def _without_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if module.training or kwargs.get("labels") is not None:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def example_call(model: nn.Module) -> dict[str, Any] | None:
    """Small inputs with which the model can be called, None if it does not say."""
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


def _head_linears(model: PreTrainedModel) -> dict[str, str]:
    head = model.get_output_embeddings()
    body = f"{model.base_model_prefix}."
    has_body = isinstance(getattr(model, model.base_model_prefix, None), nn.Module)
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module is head:
            reasons[name] = "it is the output head, kept in full precision"
        elif has_body and not name.startswith(body):
            reasons[name] = "it belongs to the head, kept in full precision"
    return reasons
