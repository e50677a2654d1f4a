"""The output head in TRL's trainers on a CPU: log-probabilities by our kernel.

From version 1.15 on, TRL's trainers compute losses from the log-probabilities of labels, which
`trl.kernels.ChunkedLogProbFunction` computes from the head's input and weight. On a CPU it does so
by torch's operators, in products of float32 and with all logits made twice.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from qlora_compile.hf.adapters import base_model
from qlora_compile.kernels import head_log_probs

_PARAMETERS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

_UNCALLED = "it has not been called yet"
_obstacles: Any = WeakTensorKeyDictionary()
"""By the weights of optimised models' heads: why TRL's own operators computed the last call; None
if our kernel did."""


def serve(model: nn.Module) -> None:
    """Have TRL's function call our kernel for the head of `model`, where that computes the same.

    Does nothing if the head is not on a CPU, if TRL is not imported, or if its function is not the
    one known here.
    """
    module: Any = sys.modules.get("trl.kernels.chunked_logprob")
    function = getattr(module, "ChunkedLogProbFunction", None)
    if function is None:
        return
    weight = getattr(_head(model), "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu":
        return
    if "apply" not in function.__dict__:
        parameters = tuple(inspect.signature(function.forward).parameters)
        if parameters != _PARAMETERS or tuple(module.OPTIONAL_OUTPUTS) != _OUTPUTS:
            return
        _replace_apply(function)
    _obstacles[weight] = _UNCALLED


def described(model: nn.Module) -> str | None:
    """Return what computed the log-probabilities of the last training step for TRL; None if that is
    not known, as before the first one."""
    weight = getattr(_head(model), "weight", None)
    obstacle = _obstacles.get(weight, _UNCALLED) if isinstance(weight, Tensor) else _UNCALLED
    if obstacle == _UNCALLED:
        return None
    if obstacle is None:
        return "log-probabilities by our kernel"
    return f"log-probabilities by TRL's operators, because {obstacle}"


def _head(model: nn.Module) -> nn.Module | None:
    base = base_model(model)
    return base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None


def _replace_apply(function: Any) -> None:
    plain = function.apply

    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        ours = not torch.compiler.is_compiling() and weight in _obstacles
        if ours:
            obstacle = _obstacles[weight] = _obstacle(hidden, weight, bias, softcap)
            ours = obstacle is None
        if not ours:
            options = temperature, chunk_size, softcap, logit_scale, outputs
            return plain(hidden, weight, bias, targets, *options)
        found = head_log_probs.head_log_probs(hidden, weight, targets, logit_scale / temperature)
        log_probs, *others = found
        kept = (each if n in outputs else None for n, each in zip(_OUTPUTS, others, strict=True))
        return (log_probs, *kept)

    function.apply = staticmethod(apply)


def _obstacle(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> str | None:
    if bias is not None:
        return "the head has a bias"
    if softcap is not None:
        return "the logits have a softcap"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed gathers the head's weight"
    if not head_log_probs.computes(hidden, weight):
        return "our kernel needs a frozen weight in the dtype of the product, and a C++ compiler"
    return None
