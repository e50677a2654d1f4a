"""Stock PEFT + bitsandbytes in eager mode, kernel by kernel.

Counted from peft 0.21's `lora/bnb.py` and bitsandbytes 0.50's `MatMul4Bit`, without dropout. On
these cards bitsandbytes' own 4-bit kernel serves up to 256 rows of weights as large as these; with
more, and in the backward always, it dequantises and calls the vendor's GEMM. Experts stay in 16
bits, because it quantises Linears alone, and PEFT adds their adapter to the whole stack.
"""

from __future__ import annotations

from bench.projection.peer import Peer, Thin
from bench.projection.traffic import EAGER_LOSS, Elementwise, Traffic

EAGER = Elementwise(
    # A norm is eight kernels over float32 copies (36 bytes), and as much again and more backward
    # (76); two of them and two residual sums of 6 bytes. Rotation is five kernels for each of q and
    # k; an MLP's activation two forward and three backward.
    forward=Traffic(
        hidden=2 * 36 + 2 * 6,
        heads=20,
        head_norm=36,
        inner=10,
        launches=2 * 8 + 2 + 10 + 2 + 1,
        head_norm_launches=2 * 8,
    ),
    backward=Traffic(
        hidden=2 * 76 + 2 * 6,
        heads=24,
        head_norm=76,
        inner=18,
        launches=2 * 13 + 2 + 16 + 3 + 3,
        head_norm_launches=2 * 13,
    ),
    loss=EAGER_LOSS,
)


def _stock(name: str, width: int) -> Peer:
    """width: bytes of what the adapter computes in."""
    casts = 6 if width == 4 else 0
    return Peer(
        name=name,
        # x cast; x Aᵀ; S Bᵀ written; scaled; cast back; the base's result cloned; both added. In
        # 16 bits autocast casts A and B instead.
        forward=Thin(x=casts + width, y=3 * width + casts + 4 + 6, launches=7),
        # dY cast; scaled; read for dS and for dB; dX written and cast; x read for dA; dX added to
        # the base's, and once more for each sibling.
        backward=Thin(
            x=2 * width + casts + 6,
            y=casts + 4 * width,
            launches=8,
            shared=6,
            shared_launches=1,
        ),
        elementwise=EAGER,
        merges=True,
    )


STOCK = _stock("stock, float32 adapters", 4)
"""As PEFT computes without autocast: its adapters are float32 by default."""
STOCK_AUTOCAST = _stock("stock, autocast", 2)
"""Under autocast to bfloat16, as in a Trainer with bf16=True."""
