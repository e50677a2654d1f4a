"""Configs: how a Triton kernel is tiled and compiled. This module holds data and needs no
Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qlora_compile.kernels.problem import Direction
from qlora_compile.kernels.variants.base import Config


@dataclass(frozen=True)
class GemmConfig(Config):
    """How the kernel of a product with W is tiled and compiled.

    block_m: rows of x; block_c: columns of the output; block_r: the reduction. decoder: how W is
    decoded in the loop, None for a dense W. loop_stages: software pipelining of the loads in the
    loop, None for Triton's own choice. weight_left: W is the product's left operand. descriptor: x
    is loaded by a tensor descriptor. prefetch: packed words are loaded two iterations ahead, to
    registers. inline: planes are read in the loop as stored; if not, the format may prepare them
    once before the loop. splits: programs that share one reduction. direction, largest_width,
    masks: the limits of the config. In the other direction, beyond that width of the adapter's
    operands, or with a masked output (backward with dropout), it would spill registers or overlap
    less.
    """

    block_m: int
    block_c: int
    block_r: int
    num_warps: int
    num_stages: int
    decoder: str | None = None
    loop_stages: int | None = None
    weight_left: bool = False
    descriptor: bool = False
    prefetch: bool = False
    inline: bool = False
    splits: int = 1
    direction: Direction | None = None
    largest_width: int = 1 << 30
    masks: bool = True
    max_registers: int | None = None

    @property
    def label(self) -> str:
        """Short and unique among shipped configs."""
        parts = [
            self.decoder or "dense",
            f"{self.block_m}x{self.block_c}x{self.block_r}",
            f"w{self.num_warps}",
            f"s{self.num_stages}" + (f"/{self.loop_stages}" if self.loop_stages else ""),
            "left" if self.weight_left else "right",
        ]
        flags = (
            ("descriptor", self.descriptor),
            ("prefetch", self.prefetch),
            ("inline", self.inline),
        )
        parts += [name for name, on in flags if on]
        parts += [f"split{self.splits}"] if self.splits > 1 else []
        parts += [f"r{self.max_registers}"] if self.max_registers else []
        return " ".join(parts)


_SM80 = GemmConfig(128, 128, 32, 4, 3, "prmt", 3, weight_left=True)
_ROOMY = replace(_SM80, block_m=64)
_SM90 = GemmConfig(128, 128, 64, 8, 3, "prmt", descriptor=True, prefetch=True)
_PLAIN = GemmConfig(128, 128, 64, 8, 2, "plain")

FUSED: dict[str, tuple[GemmConfig, ...]] = {
    "sm_80": (replace(_SM80, masks=False), _ROOMY),
    "sm_89": (
        replace(
            _SM80,
            num_warps=8,
            decoder="shfl",
            max_registers=128,
            direction="forward",
            largest_width=16,
        ),
        replace(_SM80, direction="backward", largest_width=64, masks=False),
        _ROOMY,
    ),
    "sm_90": (
        _SM90,
        replace(_SM90, num_stages=2, weight_left=True, direction="backward"),
        replace(
            _SM90,
            block_m=256,
            decoder="shfl",
            weight_left=True,
            prefetch=False,
            direction="forward",
        ),
    ),
    "sm_100": (_SM90,),
    "gfx942": (_PLAIN,),
    "gfx950": (_PLAIN,),
}

TAIL: dict[str, tuple[GemmConfig, ...]] = {
    "sm_80": (
        GemmConfig(128, 128, 64, 4, 3, weight_left=True, direction="forward"),
        GemmConfig(128, 128, 64, 4, 3, direction="backward"),
    ),
    "sm_89": (GemmConfig(128, 128, 32, 4, 3),),
    "sm_90": (GemmConfig(256, 128, 64, 8, 3, weight_left=True, descriptor=True),),
    "sm_100": (GemmConfig(128, 128, 64, 4, 4, descriptor=True),),
    "gfx942": (GemmConfig(128, 128, 64, 8, 2),),
    "gfx950": (GemmConfig(128, 128, 64, 8, 2),),
}

_SKINNY = tuple(
    GemmConfig(16, 64, 128, 4, 4, "prmt", weight_left=True, inline=True, splits=splits)
    for splits in (1, 4, 16)
)

SKINNY: dict[str, tuple[GemmConfig, ...]] = {
    **dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_100"), _SKINNY),
    **dict.fromkeys(("gfx942", "gfx950"), tuple(replace(c, decoder="plain") for c in _SKINNY)),
}


_FEW = _SKINNY[0]

GROUPED: dict[str, tuple[GemmConfig, ...]] = {
    **dict.fromkeys(("sm_80", "sm_89"), (_FEW, _ROOMY, replace(_SM80, largest_width=16))),
    **dict.fromkeys(("sm_90", "sm_100"), (_FEW, replace(_SM90, block_m=64, num_warps=4), _SM90)),
    **dict.fromkeys(
        ("gfx942", "gfx950"), (replace(_FEW, decoder="plain"), replace(_PLAIN, block_m=64), _PLAIN)
    ),
}
"""Configs for experts' packed weights: for few, some and many rows per expert."""

_DENSE_FEW = GemmConfig(16, 64, 128, 4, 3, weight_left=True)
_DENSE = GemmConfig(128, 128, 64, 8, 3)
_DENSE_SOME = replace(_DENSE, block_m=64, num_warps=4)

GROUPED_DENSE: dict[str, tuple[GemmConfig, ...]] = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100"), (_DENSE_FEW, _DENSE_SOME, _DENSE)),
    "sm_89": (_DENSE_FEW, _DENSE_SOME, replace(_DENSE, block_r=32)),
    **dict.fromkeys(
        ("gfx942", "gfx950"),
        tuple(replace(c, num_stages=2) for c in (_DENSE_FEW, replace(_DENSE, block_m=64), _DENSE)),
    ),
}
"""Configs for experts' weights in their own dtype."""


def adapter_terms(lora_dtype: torch.dtype, result: torch.dtype) -> int:
    """Return how many 16-bit products stand for an adapter's: one, or three products of two halves
    if float32 must not be rounded to float16's bits."""
    return 3 if lora_dtype == torch.float32 and result != torch.bfloat16 else 1


def adapter_width(rank: int, lora_dtype: torch.dtype, result: torch.dtype) -> int:
    """Return the columns of an adapter's operands, padded to what a tensor core takes."""
    return -(-adapter_terms(lora_dtype, result) * rank // 16) * 16


def padded(rank: int) -> int:
    """Return 16, the least that tensor cores take, or the next power of two."""
    return max(16, 1 << (rank - 1).bit_length())


FUSED_UTILIZATION = {
    "sm_80": 0.72,
    "sm_86": 1.0,
    "sm_89": 1.0,
    "sm_90": 0.72,
    "sm_100": 0.5,
    "sm_120": 1.0,
    "gfx942": 0.3,
    "gfx950": 0.3,
}
"""Tensor utilisation of the fused main loop, relative to the vendor's, for the cost model. On
consumer cards it is what a simulation of the binaries gave. On sm_80 and sm_90 the simulation gave
0.96 and 0.83 (0.54 and 0.49 without a second CTA to overlap with); about halfway between lies the
value that reproduces the published switch-over points. An H200 measured 0.68 at 8192 rows
(device.json). The values for sm_100 and gfx are guesses."""

TAIL_UTILIZATION = 0.98
