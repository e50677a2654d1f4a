"""Which ways of decoding the shipped formats there are, and what each needs."""

from __future__ import annotations

import functools
from functools import partial

from qlora_compile.kernels.formats.gpu import absmax, assembly, decode, floats, groups
from qlora_compile.kernels.gpu.decoders import Decoder

_decoder = partial(Decoder, load=absmax.load_absmax, scale=absmax.scales_of)


@functools.cache
def codebook_decoders(codebook: tuple[float, ...]) -> tuple[Decoder, ...]:
    """For sixteen values in bitsandbytes' order of nibbles."""
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

INTEGER_DECODERS = {
    4: (_integers("plain", 8, decode=groups.decode_nibbles),),
    8: (_integers("plain", 4, decode=groups.decode_bytes),),
}
"""For unsigned codes of so many bits, in groups."""

_floats = partial(Decoder, "plain", load=groups.load_groups)

E4M3_DECODERS = (
    _floats(4, groups.prepare_nothing, scale=floats.plain_scales, decode=floats.decode_e4m3),
)
E5M2_DECODERS = (
    _floats(4, groups.prepare_nothing, scale=floats.plain_scales, decode=floats.decode_e5m2),
)
MXFP4_DECODERS = (
    _floats(8, groups.prepare_nothing, scale=floats.powers_of_two, decode=floats.decode_e2m1),
)
NVFP4_DECODERS = (
    _floats(
        8,
        groups.prepare_nothing,
        load=floats.load_scales_of_scales,
        scale=floats.scales_of_scales,
        decode=floats.decode_e2m1,
    ),
)
