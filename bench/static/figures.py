"""All that is known of one compiled launch, in one record that goes into static.json."""

from __future__ import annotations

from dataclasses import dataclass

from bench.static import sass
from bench.static.amdgcn import amdgcn_resources
from bench.static.compile import Launch, compile_launch
from bench.static.decode_count import decode_mix
from bench.static.flow import path
from bench.static.memory import Traffic, traffic
from bench.static.mix import mix
from bench.static.occupancy import ctas_per_sm
from bench.static.resources import Resources, sass_resources
from bench.static.scoreboards import check_scoreboards
from bench.static.sm_step import LANES
from bench.static.targets import is_nvidia
from bench.static.utilization import Utilization, tensor_utilization, tensor_weight

CODES_PER_WORD = 8


@dataclass(frozen=True)
class Figures:
    """Of one launch on one architecture.

    ctas: that fit on an SM. loop: the main loop's instructions by class, empty where there is no
    loop or on AMD. utilization: *modelled*; None for a kernel without a tensor loop and for an
    architecture without a model. decode: instructions per eight decoded weights, by class; empty
    where nothing is decoded in the loop. traffic: of kernels that stream.
    unguarded: instructions that the control words, as read, let run before their operands are
    there; other than 0 means that the words were misread.
    """

    resources: Resources
    ctas: int
    loop: dict[str, int]
    utilization: Utilization | None
    decode: dict[str, float]
    traffic: Traffic | None
    unguarded: int
    seconds: float

    @property
    def loop_instructions(self) -> int:
        return sum(self.loop.values())

    @property
    def decode_instructions(self) -> float:
        return sum(self.decode.values())


def figures(
    launch: Launch,
    arch: str,
    macs_per_iteration: int | None,
    *,
    decodes: bool = False,
    streams: bool = False,
) -> Figures:
    """Compiles `launch` for `arch` and reads the binary.

    macs_per_iteration: BM·BN·BK of a kernel with a tensor loop, else None. decodes: codes become
    weights in that loop, BM being its constexpr of that name. streams: every program does the
    same, without a loop, so that bytes can be counted. Raises LoopError where the loop found does
    not fit the tile.
    """
    compiled = compile_launch(launch, arch)
    shared, warps = compiled.shared_bytes, compiled.warps
    if not is_nvidia(arch):
        resources = amdgcn_resources(compiled.amdgcn, shared_bytes=shared, warps=warps)
        ctas = ctas_per_sm(resources, arch)
        return Figures(resources, ctas, {}, None, {}, None, 0, compiled.seconds)
    code = sass.parse(sass.disassemble(compiled.cubin))
    usage = sass.resource_usage(compiled.cubin)
    resources = sass_resources(code, usage, shared_bytes=shared, warps=warps)
    ctas = ctas_per_sm(resources, arch)
    route = path(code, tensor_weight)
    utilization, decode, moved = None, {}, None
    if streams:
        moved = traffic(route, launch, arch, warps=warps, ctas=ctas)
    if macs_per_iteration is not None:
        utilization = tensor_utilization(
            route, arch, warps=warps, ctas=ctas, macs_per_iteration=macs_per_iteration
        )
        if decodes and utilization:
            weights = macs_per_iteration // launch.constexprs["BM"] * utilization.iterations
            words_per_thread = weights / CODES_PER_WORD / (LANES * warps)
            decode = {k: n / words_per_thread for k, n in decode_mix(route.loop).items()}
    loop = dict(mix(route.loop))
    unguarded = len(check_scoreboards(code).violations)
    return Figures(resources, ctas, loop, utilization, decode, moved, unguarded, compiled.seconds)
