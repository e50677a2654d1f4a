"""The decoders of the shipped formats, and what each needs."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

from qlora_compile.kernels.formats.gpu import (
    absmax,
    assembly,
    decode,
    floats,
    group_assembly,
    group_ptx,
    groups,
)
from qlora_compile.kernels.gpu.decoders import Decoder
from qlora_compile.kernels.layout import Layout

_decoder = partial(Decoder, load=absmax.load_absmax, scale=absmax.scales_of)


@functools.cache
def codebook_decoders(codebook: tuple[float, ...]) -> tuple[Decoder, ...]:
    """Return decoders of sixteen values in bitsandbytes' order of nibbles."""
    return (
        _decoder("plain", 8, decode.prepare_pointer, decode=decode.decode_codebook),
        _decoder(
            "prmt",
            8,
            decode.prepare_nothing,
            decode=decode.decode_codebook_prmt,
            programs=lambda dtype: (
                assembly.scaled_table(codebook, dtype),
                assembly.table_lookup(),
            ),
        ),
        _decoder(
            "shfl",
            8,
            decode.prepare_lane_table,
            decode=decode.decode_codebook_shfl,
            programs=lambda dtype: (assembly.LANE_TABLE, assembly.lane_lookup(dtype)),
        ),
    )


INT8_DECODERS = (
    _decoder("plain", 4, decode.prepare_nothing, decode=decode.decode_int8),
    _decoder(
        "prmt",
        4,
        decode.prepare_nothing,
        decode=decode.decode_int8_prmt,
        programs=lambda dtype: (assembly.int8_lookup(dtype),),
    ),
)

_integers = partial(
    Decoder, prepare=groups.prepare_nothing, load=groups.load_groups, scale=groups.integer_factors
)

_in_ptx = partial(Decoder, "prmt", load=groups.load_groups)


def _indexed(layout: Layout) -> str | None:
    indexed = layout.named.get("grouping") == "indexed"
    return "columns in groups by an index, each with factors of its own" if indexed else None


_ptx_integers = partial(
    _in_ptx, prepare=groups.prepare_nothing, scale=group_ptx.stored_factors, obstacle=_indexed
)
_ZEROS: tuple[group_assembly.Zeros, ...] = ("whole", "fractional", "minimum")

INTEGER_DECODERS = {
    4: (
        _integers("plain", 8, decode=groups.decode_nibbles),
        _ptx_integers(
            8,
            decode=group_ptx.decode_nibbles,
            programs=lambda dtype: (
                *(group_assembly.nibble_floats(dtype, zeros) for zeros in _ZEROS),
                group_assembly.nibble_pairs(dtype),
            ),
        ),
    ),
    8: (
        _integers("plain", 4, decode=groups.decode_bytes),
        _ptx_integers(
            4,
            decode=group_ptx.decode_bytes,
            programs=lambda dtype: tuple(
                group_assembly.byte_floats(dtype, zeros) for zeros in _ZEROS
            ),
        ),
    ),
}
"""Decoders of unsigned codes in groups, by the number of bits."""

_floats = partial(Decoder, "plain", load=groups.load_groups)


def _fp8_decoders(exponent_bits: int, decode: Any) -> tuple[Decoder, ...]:
    shared = {"prepare": groups.prepare_nothing, "scale": floats.plain_scales}
    return (
        _floats(4, **shared, decode=decode),
        _in_ptx(
            4,
            **shared,
            decode=group_ptx.decode_float_bytes,
            programs=lambda dtype: (group_assembly.byte_halves(dtype, exponent_bits),),
        ),
    )


def _e2m1_decoders(load: Any, scale: Any) -> tuple[Decoder, ...]:
    shared = {"prepare": groups.prepare_nothing, "load": load, "scale": scale}
    return (
        _floats(8, **shared, decode=floats.decode_e2m1),
        _in_ptx(
            8,
            **shared,
            decode=group_ptx.decode_e2m1,
            programs=lambda dtype: (
                group_assembly.scaled_magnitudes(dtype),
                group_assembly.magnitude_lookup(),
            ),
        ),
    )


E4M3_DECODERS = _fp8_decoders(4, floats.decode_e4m3)
E5M2_DECODERS = _fp8_decoders(5, floats.decode_e5m2)
MXFP4_DECODERS = _e2m1_decoders(groups.load_groups, floats.powers_of_two)
NVFP4_DECODERS = _e2m1_decoders(floats.load_scales_of_scales, floats.scales_of_scales)
