"""Unsloth's published algorithm, by descriptions of it; its code was not used.

Published: each Linear's weight is dequantised into a buffer that all share, then multiplied by the
vendor's GEMM, and the adapter is added in place (addmm); autograd functions written by hand for
q/k/v, for o and for the MLP keep no dense weight and no product of the adapter, dequantise again in
the backward and accumulate dX in place; norms, rotation, SwiGLU and cross-entropy are one kernel
each way. Adapters' factors are cast to 16 bits, activations never. Experts: 16-bit weights,
grouped products, and "split LoRA", which multiplies the rows by the factors.
https://unsloth.ai/docs/basics/faster-moe,
https://deepwiki.com/unslothai/unsloth/5.2-lora-and-activation-kernels (third-party)
"""

from __future__ import annotations

from bench.projection.peer import Peer, Thin
from bench.projection.traffic import Elementwise, Traffic

UNSLOTH = Peer(
    name="Unsloth",
    # x is read for S; y is read and written. Two casts of factors.
    forward=Thin(x=2, y=4, launches=4),
    # dY is read for dS and for dB, x for dA and for S again, dX is read and written; a sibling's
    # GEMM reads the dX it adds to.
    backward=Thin(x=2 + 2 + 4, y=2 + 2, launches=7, shared=2),
    elementwise=Elementwise(
        # Norms read and write (4), backward with the gradient (6); residual sums stay torch's (6).
        forward=Traffic(
            hidden=2 * 4 + 2 * 6,
            heads=4,
            head_norm=4,
            inner=6,
            launches=2 + 2 + 2 + 1 + 1,
            head_norm_launches=2,
        ),
        # SwiGLU's backward reads three and writes three of [M, inner].
        backward=Traffic(
            hidden=2 * 6 + 2 * 6,
            heads=4,
            head_norm=6,
            inner=12,
            launches=2 + 2 + 2 + 1 + 3,
            head_norm_launches=2,
        ),
        # Logits in 16 bits are read once, then overwritten by their gradient.
        loss=(6, 2),
    ),
    merges=False,
)
