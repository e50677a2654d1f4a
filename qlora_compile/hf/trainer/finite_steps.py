"""Steps whose loss or gradients are NaN or infinite: they end a training, or are skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlora_compile.errors import OptionError
from qlora_compile.hf.saving.whole_weights import is_spread
from qlora_compile.training_errors import NotFiniteError, UnskippableStepError

STOP, SKIP = "stop", "skip"
ON_NAN = (STOP, SKIP)


def check_on_nan(value: str) -> None:
    """Raise OptionError if `value` says nothing of what to do about NaN."""
    if value not in ON_NAN:
        raise OptionError(option="on_nan", value=value, known=" or ".join(ON_NAN))


def finite_steps(trainer_class: type, on_nan: str) -> type:
    """Return a subclass of a Trainer that looks for NaN and infinity after each backward, before
    gradients are clipped.

    on_nan: "stop" raises NotFiniteError before the optimizer has used them. "skip" drops the
    gradients of the optimizer step so far, those of its earlier batches too, counts the step in
    `skipped_steps`, and hands out the last finite loss. Where float16 is scaled, infinite gradients
    are ordinary, and torch's GradScaler skips them.

    DeepSpeed's backward ends with the optimizer's step and leaves no gradients to look at. There
    "stop" sees losses alone, after the step that used them, and the Trainer refuses "skip" by an
    UnskippableStepError.
    """

    class FiniteSteps(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if on_nan == SKIP and self.is_deepspeed_enabled:
                raise UnskippableStepError(value=on_nan)
            self.skipped_steps: list[int] = []
            self._last_finite: Tensor | None = None

        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, inputs, *args, **kwargs)
            trained = [p for p in self.model.parameters() if p.grad is not None]
            if self.accelerator.scaler is not None or self._is_finite(loss, trained):
                self._last_finite = loss
                return loss
            step = self.state.global_step + 1
            if on_nan == STOP:
                site, problem = _origin(self.model, inputs, loss)
                raise NotFiniteError(step=step, site=site, problem=problem)
            for parameter in trained:
                parameter.grad = None
            if step not in self.skipped_steps:
                self.skipped_steps.append(step)
            return torch.zeros_like(loss) if self._last_finite is None else self._last_finite

        def _is_finite(self, loss: Tensor, trained: list[nn.Parameter]) -> bool:
            """Whether loss and gradients are finite in every process; reads one number."""
            total = loss.float()
            if grads := [_local(parameter.grad) for parameter in trained]:
                total = total + torch.stack(_norms(grads, total.device)).sum()
            bad = (~total.isfinite()).float()
            if self.args.world_size > 1:
                torch.distributed.all_reduce(bad)
            return bad.item() == 0

    FiniteSteps.__name__ = FiniteSteps.__qualname__ = trainer_class.__name__
    return FiniteSteps


def _local(tensor: Any) -> Tensor:
    """Return the part of a sharded tensor that this process has."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _norms(grads: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return the largest magnitudes, in which squares cannot overflow."""
    norms = torch._foreach_norm([grad for grad in grads if grad.numel()], float("inf"))
    return [norm.to(device, torch.float32) for norm in norms]


def _origin(model: nn.Module, inputs: Any, loss: Tensor) -> tuple[str, str]:
    """Return the site where NaN or infinity arose, and what is wrong there."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _finite(parameter):
            return name, "holds NaN or infinite values already"
    if isinstance(inputs, Mapping):
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not _finite(value):
                return f"the batch's {name}", "holds NaN or infinite values"
        # One process may find another origin before this, and all must call a spread model.
        if not _finite(loss) and not is_spread(model) and (block := _first_block(model, inputs)):
            return block, "gives NaN or infinite values"
    # A bad gradient spoils the gradients of all earlier sites.
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if not _finite(loss):
        return "the loss", f"is {loss.item()}"
    if bad:
        others = f", and so have {len(bad) - 1} sites before it" if len(bad) > 1 else ""
        return bad[-1], f"has a gradient with NaN or infinite values{others}"
    return "another process", "has a loss or a gradient that is not finite"


def _finite(tensor: Tensor) -> bool:
    return bool(_local(tensor.detach()).isfinite().all())


def _first_block(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Return the name of the first block whose output is not finite for `inputs`, if one is."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(block: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(map(_finite, _floats(output))):
                found.append(name)

        return look

    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    hooks = [
        block.register_forward_hook(watch(f"{name}.{number}"))
        for name, blocks in lists
        for number, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _floats(output: Any) -> Iterator[Tensor]:
    return (
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
