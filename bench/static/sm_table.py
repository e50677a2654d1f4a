"""Every constant of the SM model, in one place.

All of them are *modelled*: taken from vendors' published rates where there are any, else from the
stall counts that the compiler itself puts between instructions; none was measured here. Rates are
per sub-core (a quarter of an SM, the part that one scheduler feeds) unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """One SM. Cycles are clocks of the SM.

    Limits: registers (32-bit, per SM), warps, ctas, shared_bytes (largest sum over CTAs).
    Issue cycles, how long one warp instruction keeps a sub-core's unit busy:
      mma: HMMA m16n8k16, bfloat16 or float16 operands, float32 accumulation; 0: no model.
      alu, float32, integer_multiply, half_pair, bfloat16_pair, special, uniform.
      move: MOV, which sm_120 runs beside the float units.
    wgmma_macs: multiply-accumulates per clock of the whole SM; 0: no wgmma.
    shared_bytes_per_cycle: of the whole SM, shuffles included. global_bytes_per_cycle: loads and
    stores through the first-level cache, of the whole SM.
    Latencies in cycles, from issue to the scoreboard's release: shared_latency, global_latency,
    store_latency (until a store's sources may be overwritten: read_latency), fixed_latency,
    variable_latency (special functions, constants, barriers of the TMA), mma_latency.
    barrier_cycles: from the last arrival to the others' next issue.
    """

    registers: int = 65536
    warps: int = 64
    ctas: int = 32
    shared_bytes: int = 0
    mma: float = 0.0
    wgmma_macs: int = 0
    alu: float = 2.0
    float32: float = 1.0
    integer_multiply: float = 2.0
    wide_multiply: float = 4.0
    half_pair: float = 1.0
    bfloat16_pair: float = 2.0
    special: float = 8.0
    uniform: float = 1.0
    move: float = 2.0
    shared_bytes_per_cycle: int = 128
    global_bytes_per_cycle: int = 64
    shared_latency: int = 23
    global_latency: int = 500
    store_latency: int = 10
    read_latency: int = 12
    fixed_latency: int = 4
    variable_latency: int = 24
    fence_latency: int = 20
    barrier_cycles: int = 20
    wgmma_latency: int = 32

    @property
    def macs_per_cycle(self) -> float:
        """What the tensor cores of the whole SM do at most; 0 where they are not modelled."""
        if self.wgmma_macs:
            return float(self.wgmma_macs)
        return SUBCORES * MACS_PER_MMA / self.mma if self.mma else 0.0


SUBCORES = 4
MACS_PER_MMA = 2048
CTA_STAGGER = 157
"""Cycles between the starts of an SM's CTAs: on a device they drift apart. Most loops settle into
the same rhythm from any start; CTAs that begin in step can lose up to 0.1 of utilization."""

MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_bytes=163 << 10, mma=8, float32=2, global_latency=500),
    # The consumer cards do half the mma rate when accumulating in float32.
    "sm_86": Multiprocessor(shared_bytes=99 << 10, warps=48, ctas=16, mma=32, global_latency=500),
    "sm_89": Multiprocessor(shared_bytes=99 << 10, warps=48, ctas=24, mma=32, global_latency=550),
    "sm_90": Multiprocessor(
        shared_bytes=227 << 10,
        mma=6.5,
        wgmma_macs=2048,
        shared_latency=30,
        barrier_cycles=25,
        global_latency=600,
    ),
    # tcgen05 runs beside the warps from its own memory: no model, mma stays 0.
    "sm_100": Multiprocessor(
        shared_bytes=227 << 10, shared_latency=30, barrier_cycles=25, global_latency=700
    ),
    "sm_120": Multiprocessor(
        shared_bytes=99 << 10,
        warps=48,
        ctas=24,
        mma=32,
        move=1,
        shared_latency=29,
        barrier_cycles=25,
        global_latency=600,
    ),
}


@dataclass(frozen=True)
class ComputeUnit:
    """AMD's SM: four SIMDs. registers: per lane of a SIMD, vector and accumulation together.
    waves: per SIMD. shared_bytes: per compute unit. granule: registers are given out in eights."""

    registers: int = 512
    waves: int = 8
    shared_bytes: int = 64 << 10
    granule: int = 8


COMPUTE_UNITS = {"gfx942": ComputeUnit(), "gfx950": ComputeUnit(shared_bytes=160 << 10)}


@dataclass(frozen=True)
class Card:
    """A device for the memory model. clock: Hz. bandwidth: bytes per second of its DRAM, peak;
    l2_bandwidth: of reads from its second-level cache, as streaming reaches it."""

    arch: str
    sms: int
    clock: float
    bandwidth: float
    l2_bandwidth: float


CARDS = {
    "A100 80 GB": Card("sm_80", 108, 1.41e9, 2.039e12, 5.0e12),
    "RTX 3090": Card("sm_86", 82, 1.70e9, 0.936e12, 2.0e12),
    "RTX 4090": Card("sm_89", 128, 2.52e9, 1.008e12, 5.0e12),
    "H100 SXM": Card("sm_90", 132, 1.755e9, 3.35e12, 5.5e12),
    "H200 SXM": Card("sm_90", 132, 1.755e9, 4.8e12, 5.5e12),
    "B200": Card("sm_100", 148, 1.85e9, 8.0e12, 10.0e12),
    "RTX 5090": Card("sm_120", 170, 2.41e9, 1.792e12, 6.0e12),
}
ACHIEVABLE_BANDWIDTH = 0.92
"""The share of the peak that plain streaming reaches."""
