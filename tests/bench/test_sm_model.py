"""The SM model on programs whose cycles can be counted by hand."""

import dataclasses

import pytest

from bench.static.flow import Path
from bench.static.sass import Instruction
from bench.static.sm_model import ITERATIONS, StuckError, simulate
from bench.static.sm_table import MULTIPROCESSORS, Multiprocessor
from bench.static.utilization import LoopError, tensor_utilization
from tests.bench.sass_text import program

SM = Multiprocessor(
    shared_bytes=100 << 10, mma=8, shared_latency=30, global_latency=500, barrier_cycles=20
)
MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


def loop(*lines: str | tuple[str, dict[str, int]]) -> Path:
    return Path((), tuple(program(*lines)), ())


def period(path: Path, *, warps: int = 4, ctas: int = 1, sm: Multiprocessor = SM) -> float:
    return simulate(path, sm, warps=warps, ctas=ctas).period


def test_a_warp_issues_as_its_stalls_say() -> None:
    assert period(loop(("NOP", {"stall": 5}), ("NOP", {"stall": 2}))) == 7


def test_warps_of_a_sub_core_share_its_issue_slot() -> None:
    code = loop(*["NOP"] * 100)
    assert period(code, warps=4) == 100
    assert period(code, warps=8) == 200
    assert period(code, warps=4, ctas=3) == pytest.approx(300, rel=0.01)


def test_units_of_a_sub_core_run_side_by_side() -> None:
    assert period(loop(*["LOP3 R0, R1, R2"] * 6)) == 6 * SM.alu
    assert period(loop(*["FADD R0, R1, R2"] * 6)) == 6 * SM.float32
    mixed = ["LOP3 R0, R1, R2", "FADD R3, R4, R5"] * 6
    assert period(loop(*mixed)) == 6 * SM.alu


def test_tensor_cores_bound_a_loop_of_multiplications() -> None:
    assert period(loop(*[MMA] * 6)) == 6 * SM.mma
    assert period(loop(*[MMA] * 6), warps=8) == 12 * SM.mma


def test_half_the_depth_takes_half_the_time() -> None:
    assert period(loop(*[MMA.replace("16816", "1688")] * 6)) == 3 * SM.mma


def test_a_scoreboard_holds_its_reader() -> None:
    loads = ("LDS R0, [R1]", {"write": 2})
    waits = ("FADD R2, R0, R0", {"wait": 0b100})
    one_wavefront = 1
    assert period(loop(loads, waits), warps=1) == one_wavefront + SM.shared_latency + 1
    free = ("FADD R2, R0, R0", {"wait": 0b011})
    assert period(loop(loads, free), warps=1) == 2


def test_shared_memory_moves_128_bytes_a_cycle() -> None:
    code = loop(*[("LDS.128 R0, [R4]", {"write": 0})] * 8, ("FADD R8, R0, R0", {"wait": 1}))
    per_warp = 8 * 32 * 16 / 128
    assert period(code, warps=8) >= 8 * per_warp
    assert period(code, warps=8) == pytest.approx(8 * per_warp, abs=SM.shared_latency + 8)


def test_a_barrier_waits_for_the_slowest_warp() -> None:
    code = loop(("LDS R0, [R1]", {"write": 0}), ("BAR.SYNC 0x0", {"wait": 1}))
    four_wavefronts = 4
    cycles = four_wavefronts + SM.shared_latency + SM.barrier_cycles
    assert period(code, warps=4) == pytest.approx(cycles, abs=2)


def test_barriers_of_different_ctas_are_apart() -> None:
    assert period(loop("NOP", "BAR.SYNC 0x0"), warps=4, ctas=2) == pytest.approx(
        1 + SM.barrier_cycles, abs=3
    )


def test_asynchronous_copies_are_waited_for_by_group() -> None:
    copy = ["LDGSTS.E.128 [R0], [R2.64]", "LDGDEPBAR"]
    at_once = period(loop(*copy, "DEPBAR.LE SB0, 0x0"), warps=4)
    ahead = period(loop(*copy, "DEPBAR.LE SB0, 0x2"), warps=4)
    assert at_once == pytest.approx(SM.global_latency, rel=0.05)
    assert ahead == pytest.approx(SM.global_latency / 3, rel=0.1)


def test_wgmma_runs_beside_the_warps() -> None:
    sm = dataclasses.replace(SM, wgmma_macs=2048, wgmma_latency=32)
    multiply = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0"
    cycles = 64 * 128 * 16 / 2048
    work = ["LOP3 R0, R1, R2"] * 20
    left_over = loop(multiply, *work, "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    waited = loop(multiply, *work, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert period(left_over, sm=sm) == pytest.approx(cycles, abs=1)
    assert period(waited, sm=sm) == pytest.approx(cycles + 32, abs=2)


def test_the_whole_kernel_is_start_iterations_and_end() -> None:
    code = tuple(program("NOP"))
    path = Path(code * 100, code * 10, code * 50)
    timeline = simulate(path, SM, warps=4, ctas=1)
    assert timeline.period == 10
    assert timeline.total == pytest.approx(100 + ITERATIONS * 10 + 50, abs=1)


def test_warps_that_wait_for_nobody_are_an_error() -> None:
    with pytest.raises(StuckError, match="4 of 4 warps"):
        simulate(loop("BAR.SYNC 0x1, 0x100"), SM, warps=4, ctas=1)


def multiplications(count: int) -> tuple[Instruction, ...]:
    return tuple(program(*[MMA] * count))


def test_utilization_of_a_loop_that_only_multiplies() -> None:
    path = Path((), multiplications(16), ())
    tile = 16 * 2048 * 4
    found = tensor_utilization(path, "sm_80", warps=4, ctas=2, macs_per_iteration=tile)
    assert found is not None
    assert found.tensor == pytest.approx(1.0)
    assert found.period == 2 * 16 * MULTIPROCESSORS["sm_80"].mma
    assert found.cycles(10) == pytest.approx(10 * found.period, abs=400)


def test_utilization_knows_an_unrolled_loop() -> None:
    path = Path((), multiplications(16), ())
    found = tensor_utilization(path, "sm_89", warps=4, ctas=1, macs_per_iteration=8 * 2048 * 4)
    assert found is not None
    assert found.iterations == 2
    assert found.cycles(8) - found.cycles(4) == pytest.approx(2 * found.period)


def test_utilization_refuses_another_loop() -> None:
    path = Path((), multiplications(16), ())
    with pytest.raises(LoopError, match="131072 multiply-accumulates, the tile has 1000"):
        tensor_utilization(path, "sm_80", warps=4, ctas=1, macs_per_iteration=1000)


def test_a_loop_without_tensor_cores_does_not_use_them() -> None:
    path = Path((), tuple(program(*["FFMA R0, R1, R2, R0"] * 8)), ())
    assert tensor_utilization(path, "sm_80", warps=4, ctas=1, macs_per_iteration=2048) is None


def test_sm_100_is_not_modelled() -> None:
    path = Path((), multiplications(16), ())
    assert tensor_utilization(path, "sm_100", warps=4, ctas=1, macs_per_iteration=2048) is None
