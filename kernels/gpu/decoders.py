"""Which ways of decoding there are for a format, and what each needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qlora_compile.kernels.gpu import assembly, decode

_PTX_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Decoder:
    """One exact way to decode tiles of one format on the device.

    function, prepare: as in `kernels/gpu/decode.py`. programs: from a PTX dtype to the inline
    assembly, None for plain Triton, which decodes to any dtype on any target.
    """

    name: str
    per_word: int
    function: Any
    prepare: Any
    programs: Callable[[str], tuple[str, ...]] | None = None

    @functools.cache  # noqa: B019  decoders are few, and stay
    def program(self, dtype: torch.dtype) -> tuple[str, ...]:
        return () if self.programs is None else self.programs(_PTX_DTYPES[dtype])

    def rejects(self, target: str, dtype: torch.dtype) -> list[str]:
        """Why it cannot decode to `dtype` on `target`."""
        reasons = []
        if self.programs is not None and not target.startswith("sm_"):
            reasons.append(f"decoder {self.name} is PTX and {target} is not NVIDIA's")
        if self.programs is not None and dtype not in _PTX_DTYPES:
            reasons.append(f"decoder {self.name} gives bfloat16 or float16, not {dtype}")
        return reasons


@functools.cache
def codebook_decoders(codebook: tuple[float, ...]) -> tuple[Decoder, ...]:
    """For sixteen values in bitsandbytes' order of nibbles."""
    return (
        Decoder("plain", 8, decode.decode_codebook, decode.prepare_pointer),
        Decoder(
            "prmt",
            8,
            decode.decode_codebook_prmt,
            decode.prepare_pointer,
            partial(_table_programs, codebook),
        ),
        Decoder(
            "shfl",
            8,
            decode.decode_codebook_shfl,
            decode.prepare_lane_table,
            _lane_programs,
        ),
    )


def _table_programs(codebook: tuple[float, ...], dtype: str) -> tuple[str, ...]:
    return (assembly.scaled_table(codebook, dtype), assembly.table_lookup())


def _lane_programs(dtype: str) -> tuple[str, ...]:
    return (assembly.LANE_TABLE, assembly.lane_lookup(dtype))


def _int8_programs(dtype: str) -> tuple[str, ...]:
    return (assembly.int8_lookup(dtype),)


INT8_DECODERS = (
    Decoder("plain", 4, decode.decode_int8, decode.prepare_nothing),
    Decoder("prmt", 4, decode.decode_int8_prmt, decode.prepare_nothing, _int8_programs),
)
