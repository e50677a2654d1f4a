"""What the keys of torch's two caches of generated code leave out, for our graphs put into them.

AOTAutograd looks up the graph that Dynamo captured, Inductor the forward and the backward that
AOTAutograd makes of that graph. Neither key holds everything that decides about the code: a run
with other settings, or on another processor, would be given stale code, and wrong numbers.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import torch
import torch.compiler.config as compiler_config

_ATTENTIONS = ("flash", "mem_efficient", "math", "cudnn")


def cache_key_tag(*parts: object, on_cpu: bool) -> str:
    """The `torch.compiler.config.cache_key_tag` for a graph whose code depends on `parts` and on
    `unkeyed_settings`."""
    told = (compiler_config.cache_key_tag, unkeyed_settings(on_cpu=on_cpu), *parts)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def unkeyed_settings(*, on_cpu: bool) -> dict[str, Any]:
    """The values of all settings of torch that change generated code but not a cache's key.

    Dynamo's settings are not among them: they change the captured graph, and both keys hold that.
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
        # Code is written for vectors of one width, and compiled for those there are.
        "vectors": str(pick_vec_isa()) if on_cpu else None,
    }
    # Inductor's key holds none of what decides how AOTAutograd splits the graph, and AOTAutograd's
    # key no functions.
    for config in (autograd_config, symbolic_config):
        for name, value in config.get_config_copy().items():
            found[f"{config.__name__}.{name}"] = _text(value)
    return found


def _text(value: Any) -> str:
    if callable(value):
        # Without an identity of its own a function could have been edited since.
        identity = getattr(value, "uuid", uuid.uuid4)()
        return f"{type(value)} {identity or uuid.uuid4()}"
    return repr(value)
