"""LogitsFreeLoss: computes a causal language model's loss without its logits, by hooks.

In a training call with labels the hooks give the head no rows, and replace its output by a
`LazyLogits`. The model's loss function then computes the loss from the head's real input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from qlora_compile.errors import LogitsFreeLossError
from qlora_compile.hf import trl_head
from qlora_compile.hf.adapters import base_model
from qlora_compile.hf.blocks import example_call
from qlora_compile.hf.head_operands import HeadLoss, head_operands
from qlora_compile.hf.lazy_logits import LazyLogits
from qlora_compile.hf.probing import left_as_found
from qlora_compile.hf.replaced_forward import plain_function, qualified_name, replaced_forward

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_LOW_PRECISION_TOLERANCE = 2e-2  # the two ways round logits before the softcap or after it


@dataclass
class _Call:
    """A call that computes a loss without logits. hidden: the head's input [..., K], None before
    the call has reached the head."""

    model: str
    hidden: Tensor | None = None


_CALL: ContextVar[_Call | None] = ContextVar("logits-free call", default=None)


def check(model: nn.Module, *, whole: bool, example_inputs: Mapping[str, Any] | None) -> None:
    """Raise LogitsFreeLossError unless the loss of `model` can be computed without its logits.

    whole: whether the model is to be compiled as one region. example_inputs: keyword arguments of
    the model, None for its dummy inputs. The model is called twice, with its logits and without,
    to compare the losses, and is left as it was.
    """
    base: Any = base_model(model)
    name = type(base).__name__

    def refuse(problem: str) -> LogitsFreeLossError:
        return LogitsFreeLossError(model=name, problem=problem)

    if not isinstance(base, PreTrainedModel):
        raise refuse("is not a transformers model")
    head = base.get_output_embeddings()
    if head is None:
        raise refuse("has no output head")
    if base.loss_function is not ForCausalLMLoss:
        raise refuse("computes its loss by other code than transformers' ForCausalLMLoss")
    if "labels" not in inspect.signature(type(base).forward).parameters:
        raise refuse("takes no labels")
    if whole:
        raise refuse("would be compiled as a whole, including its head")
    if (forward := replaced_forward(head)) is not None:
        raise refuse(f"has a head whose forward is replaced by {qualified_name(forward)}")
    if head_operands(head) is None:
        raise refuse(f"has a head of an unknown class, {type(head).__name__}")
    inputs = dict(example_inputs or example_call(base) or {})
    ids = inputs.get("input_ids")
    if inputs.get("labels") is None:
        if not isinstance(ids, Tensor):
            raise refuse("needs example_inputs with input_ids for a trial call")
        inputs["labels"] = ids.clone()
    plain, _ = _trial(model, inputs)
    installed = LogitsFreeLoss(model)
    try:
        ours, absent = _trial(model, inputs)
    finally:
        installed.remove()
    if not absent:
        raise refuse("makes its logits without calling its head")
    tolerance = _TOLERANCE.get(base.dtype, _LOW_PRECISION_TOLERANCE)
    if not torch.allclose(ours, plain, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise refuse(
            f"has a loss of {float(plain):.6g}, which would be {float(ours):.6g} without logits"
        )


def _trial(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """Return the loss in training mode, with the same dropout every time, and whether the output
    has no logits."""
    with left_as_found(model), torch.no_grad():
        model.train()
        torch.manual_seed(0)
        output = model(**{**inputs, "return_dict": True})
    return output.loss.float(), output.get("logits") is None


def described(model: nn.Module) -> str | None:
    """Return what computes the loss in training; None without the hooks of `LogitsFreeLoss` and
    without a trainer of TRL that our kernel could serve."""
    base: Any = base_model(model)
    loss = base.__dict__.get("_loss_function")
    asked = isinstance(loss, _Loss)
    if asked and loss.mismatch is not None:
        return f"computed from the logits, because without them {loss.mismatch}"
    forward = replaced_forward(base)
    if forward is None:
        if not asked:
            return None
        if head_operands(base.get_output_embeddings()) is None:
            return "computed from the logits, which the head's present adapter or forward needs"
        return "computed without logits"
    # For example, TRL's trainers compute the loss from the head's input and weight themselves.
    # Their forward bears the name of the model's own.
    module = getattr(plain_function(forward), "__module__", None)
    module = getattr(plain_function(forward), "__globals__", {}).get("__name__", module)
    left = f"left to the forward that {module} has put in place of the model's"
    if (head := trl_head.described(model)) is not None:
        return f"{left}; {head}"
    return left if asked else None


def check_of(model: nn.Module) -> Any:
    """Return the `check` that LogitsFreeLoss was given, None without one."""
    return getattr(base_model(model).__dict__.get("_loss_function"), "check", None)


class LogitsFreeLoss:
    """The hooks of one model. model: the module that users call, perhaps a PeftModel. check: is
    shown every loss before it is computed, and returns what is wrong with computing it without
    logits, or None.

    Raises LogitsFreeLossError if an adapter on the head is of a kind that `head_operands` does not
    know.
    """

    def __init__(
        self, model: nn.Module, check: Callable[[HeadLoss], str | None] | None = None
    ) -> None:
        base: Any = base_model(model)
        head: Any = base.get_output_embeddings()
        self.model = base
        self.name = type(base).__name__
        if head_operands(head) is None:
            problem = f"has an adapter of an unknown class on its head, {type(head).__name__}"
            raise LogitsFreeLossError(model=self.name, problem=problem)
        base.loss_function = _Loss(base.loss_function, check)
        # Not on `base`: a PeftModel calls the forward of the model inside directly, and the hooks
        # there would not run.
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            # Functions, because PEFT copies a head that it trains in full, hooks and all: with
            # methods of this object, it would copy the model too.
            head.register_forward_pre_hook(_before_head),
            head.register_forward_hook(_after_head),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        del self.model._loss_function

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wants_loss = module.training and kwargs.get("labels") is not None
        kept = kwargs.get("logits_to_keep")
        keeps_all = kept is None or (isinstance(kept, int) and kept == 0)
        # Set in every call, so that nothing remains of an interrupted call.
        logits_free = wants_loss and keeps_all and not torch.compiler.is_compiling()
        _CALL.set(_Call(self.name) if logits_free else None)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        _CALL.set(None)
        return _without_logits(output)


def _before_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    call = _CALL.get()
    if call is None or len(args) != 1 or head_operands(module) is None:
        return None
    call.hidden = args[0]
    # The head runs without any rows: that costs nothing and shows the logits' dtype.
    return (args[0][:0].detach(),)


def _after_head(module: nn.Module, args: Any, output: Tensor) -> Any:
    call = _CALL.get()
    if call is None or call.hidden is None:
        return None
    hidden, call.hidden = call.hidden, None
    shape = torch.Size((*hidden.shape[:-1], output.shape[-1]))
    return LazyLogits(hidden, module, call.model, shape, output.dtype, output.device)


def _without_logits(output: Any) -> Any:
    """Return the model's output, in its own class, without LazyLogits; None leaves it as it is."""
    if isinstance(output, ModelOutput):
        names = [field.name for field in fields(type(output))]  # pyright: ignore[reportArgumentType]
        values = {name: output.get(name) for name in names}
        if any(isinstance(value, LazyLogits) for value in values.values()):
            values = {k: None if isinstance(v, LazyLogits) else v for k, v in values.items()}
            return type(output)(**values)
    elif isinstance(output, tuple):
        return tuple(value for value in output if not isinstance(value, LazyLogits))
    return None


class _Loss:
    """Stands for the model's `loss_function`, and is `plain` unless the logits are LazyLogits."""

    def __init__(self, plain: Any, check: Callable[[HeadLoss], str | None] | None) -> None:
        self.plain, self.check = plain, check
        self.mismatch: str | None = None

    def __call__(self, logits: Any, labels: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(logits, LazyLogits):
            return self.plain(logits, labels, *args, **kwargs)
        return _causal_loss(self._computed, logits, labels, *args, **kwargs)

    def _computed(self, loss: HeadLoss) -> Tensor:
        if self.check is not None:
            self.mismatch = self.check(loss)
        return loss.without_logits() if self.mismatch is None else loss.with_logits()


def _causal_loss(
    computed: Callable[[HeadLoss], Tensor],
    logits: LazyLogits,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute transformers' ForCausalLMLoss, with the same arguments, from the head's input.

    computed: returns the loss of a HeadLoss.
    """
    if vocab_size != logits.shape[-1]:
        problem = f"has {logits.shape[-1]} logits for {vocab_size} words"
        raise LogitsFreeLossError(model=logits.model, problem=problem)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    operands = head_operands(logits.head)
    assert operands is not None
    # accelerate moves what the head is given to the head's device.
    hidden = logits.hidden.to(logits.device)
    head_loss = HeadLoss(
        hidden.reshape(-1, hidden.shape[-1]),
        shift_labels.reshape(-1).to(logits.device),
        operands,
        softcap=logits.softcap,
        logit_scale=logits.logit_scale,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    loss = computed(head_loss)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
