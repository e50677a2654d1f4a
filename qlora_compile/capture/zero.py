"""DeepSpeed's ZeRO-3: has it gather all weights of a block at once, as compiled code needs them.

By default ZeRO-3 gathers the weights of each inner module by hooks on that module, which compiled
code does not run. Before the forward of a *leaf module* it gathers all weights inside the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qlora_compile.capture.first_block import with_gradient

_LEAF = "_z3_leaf"
"""The attribute that `deepspeed.utils.set_z3_leaf_module` sets. Set here without DeepSpeed, which a
script may import after `optimize` only."""


def gather_whole(block: nn.Module) -> RemovableHandle:
    """Have ZeRO-3, if it manages the model, gather all weights of `block` at once."""
    setattr(block, _LEAF, True)
    return block.register_forward_pre_hook(_with_gradient, with_kwargs=True)


def gather_apart(block: nn.Module, handle: RemovableHandle) -> None:
    """Undo `gather_whole`."""
    handle.remove()
    block.__dict__.pop(_LEAF, None)


def _with_gradient(block: nn.Module, args: Any, kwargs: Any) -> Any:
    """Let an input of a gathered block require a gradient.

    Otherwise DeepSpeed releases the weights once the gradients of the outputs are known, before
    the gradients of the weights have been added up.
    """
    if "ds_id" in block.__dict__ and torch.is_grad_enabled():
        args, kwargs, _ = with_gradient(block, args, kwargs)
        return args, kwargs
    return None
