"""Cache tag: adds to the keys of torch's two code caches what they leave out.

AOTAutograd's cache is keyed by the graph that Dynamo captured, Inductor's by the forward and the
backward that AOTAutograd makes of that graph. Neither key holds everything that the code depends
on: a run with other settings, or on another processor, would get stale code, and wrong numbers.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import torch
import torch.compiler.config as compiler_config

_ATTENTIONS = ("flash", "mem_efficient", "math", "cudnn")


def cache_key_tag(*parts: object, on_cpu: bool) -> str:
    """Return a `torch.compiler.config.cache_key_tag` for a graph: a SHA-256 hex digest.

    It covers the tag that is set already, `unkeyed_settings` and the `parts`, by their repr.
    """
    tagged = (compiler_config.cache_key_tag, unkeyed_settings(on_cpu=on_cpu), *parts)
    return hashlib.sha256(repr(tagged).encode()).hexdigest()


def unkeyed_settings(*, on_cpu: bool) -> dict[str, Any]:
    """Return all settings of torch that change generated code but not the key of a cache.

    Dynamo's settings are left out: they change the captured graph, which is part of both keys.
    """
    from torch._functorch import config as autograd_config
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch.fx.experimental import _config as symbolic_config

    cuda, mkldnn, einsum = torch.backends.cuda, torch.backends.mkldnn, torch.backends.opt_einsum
    found: dict[str, Any] = {
        # How attention, einsum and float32 products are traced and lowered.
        "sdp": [getattr(cuda, f"{name}_sdp_enabled")() for name in _ATTENTIONS],
        "sdp_priority": torch._C._get_sdp_priority_order(),
        "einsum": (einsum.enabled, einsum.strategy),
        "mkldnn": (mkldnn.enabled, mkldnn.matmul.fp32_precision),
        # Inductor writes code for one vector width, and compiles for the vectors of this CPU.
        "vectors": str(pick_vec_isa()) if on_cpu else None,
    }
    # Inductor's key has no setting of how AOTAutograd splits the graph; AOTAutograd's key has the
    # settings, but not those that are functions.
    for config in (autograd_config, symbolic_config):
        for name, value in config.get_config_copy().items():
            found[f"{config.__name__}.{name}"] = _text(value)
    return found


def _text(value: Any) -> str:
    if callable(value):
        # A function without a uuid may have been edited since: give it a new one every time.
        identity = getattr(value, "uuid", uuid.uuid4)()
        return f"{type(value)} {identity or uuid.uuid4()}"
    return repr(value)
