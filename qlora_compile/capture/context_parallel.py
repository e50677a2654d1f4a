"""Refuses torch's context parallelism, which splits rows along their tokens, during a step."""

from __future__ import annotations

from torch.nn import functional

from qlora_compile.training_errors import ContextParallelError

_PLAIN = functional.scaled_dot_product_attention


def refuse_context_parallel() -> None:
    """Raise ContextParallelError inside `torch.distributed.tensor.experimental.context_parallel`.

    The context replaces torch's attention by one that exchanges keys and values, which compiled
    code does not call. accelerate enters it for a `ParallelismConfig` with cp_size above 1.
    """
    attention = functional.scaled_dot_product_attention
    if attention is not _PLAIN and "context_parallel" in attention.__module__:
        raise ContextParallelError(value="torch's context_parallel")
