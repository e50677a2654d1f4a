"""Registers, spills, accesses, occupancy and traffic, from text and from programs by hand."""

import dataclasses

import pytest
import torch

from bench.static.amdgcn import AssemblyError, amdgcn_resources
from bench.static.memory import Traffic, traffic
from bench.static.occupancy import ctas_per_sm, limits
from bench.static.resources import Resources, sass_resources
from qlora_compile.kernels.gpu.launch import Launch
from tests.bench.sass_text import program

AMD = """
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\tbuffer_load_dwordx4 v4, s[8:11], 0 offen lds
\tglobal_load_ubyte v1, v[2:3], off
\tbuffer_load_ushort v1, v2, s[0:3], 0 offen
\tglobal_store_dwordx2 v[0:1], v[2:3], off
\tglobal_atomic_add_f32 v[0:1], v2, off
amdhsa.kernels:
  - .agpr_count:     16
    .private_segment_fixed_size: 0
    .sgpr_count:     30
    .sgpr_spill_count: 0
    .vgpr_count:     104
    .vgpr_spill_count: 0
"""


def test_amd_assembly() -> None:
    found = amdgcn_resources(AMD, shared_bytes=1024, warps=4)
    assert (found.registers, found.accumulators, found.scalars) == (104, 16, 30)
    assert found.tensor == {"v_mfma_f32_32x32x8_bf16": 2}
    assert found.loads == {128: 2, 8: 1, 16: 1}
    assert found.stores == {64: 1, 32: 1}
    assert found.mix == {"mfma": 2, "global memory": 6}
    assert not found.spilled


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (".vgpr_spill_count: 0", ".vgpr_spill_count: 3"),
        (".private_segment_fixed_size: 0", ".private_segment_fixed_size: 64"),
        ("\tglobal_load_ubyte v1, v[2:3], off", "\tscratch_load_dword v1, off, s32"),
    ],
)
def test_amd_spills(before: str, after: str) -> None:
    assert before in AMD
    assert amdgcn_resources(AMD.replace(before, after), shared_bytes=0, warps=4).spilled


def test_amd_scalars_parked_in_vector_registers_are_no_spills() -> None:
    text = AMD.replace(".sgpr_spill_count: 0", ".sgpr_spill_count: 5")
    found = amdgcn_resources(text, shared_bytes=0, warps=4)
    assert (found.parked_scalars, found.spilled) == (5, False)


def test_amd_assembly_that_is_not_understood() -> None:
    with pytest.raises(AssemblyError, match=r"no \.vgpr_count"):
        amdgcn_resources(AMD.replace(".vgpr_count", ".other"), shared_bytes=0, warps=4)
    with pytest.raises(AssemblyError, match="global_load_strange"):
        amdgcn_resources("\tglobal_load_strange v1, v2\n" + AMD, shared_bytes=0, warps=4)


def test_sass_accesses_and_spills() -> None:
    code = program(
        "LDG.E.128 R4, [R2.64]", "LDGSTS.E.BYPASS.128 [R0], [R2.64]", "LDG.E.U8 R4, [R2.64]",
        "UTMALDG.2D [UR8], [UR4]", "STG.E.64 [R2.64], R4", "HMMA.16816.F32 R4, R8, R12, R4",
        "STL [R1], R4", "LDL R4, [R1]",
    )  # fmt: skip
    usage = {"REG": 64, "STACK": 8, "LOCAL": 0}
    found = sass_resources(code, usage, shared_bytes=512, warps=4)
    assert found.loads == {128: 2, 8: 1, 0: 1}
    assert found.stores == {64: 1}
    assert found.tensor == {"HMMA": 1}
    assert found.mix == {
        **{"global load": 2, "asynchronous copy": 1, "bulk copy": 1, "global store": 1},
        **{"mma": 1, "spill": 2},
    }
    assert (found.registers, found.spills, found.stack_bytes) == (64, 2, 8)
    assert found.spilled


def test_ctas_per_sm() -> None:
    taken = Resources(registers=128, stack_bytes=0, spills=0, shared_bytes=30 << 10, warps=8)
    assert limits(taken, "sm_80") == {"registers": 2, "shared memory": 5, "warps": 8, "CTAs": 32}
    assert ctas_per_sm(taken, "sm_80") == 2
    assert ctas_per_sm(dataclasses.replace(taken, registers=129), "sm_80") == 1
    assert ctas_per_sm(dataclasses.replace(taken, shared_bytes=99 << 10), "sm_86") == 0
    assert ctas_per_sm(dataclasses.replace(taken, warps=4), "gfx942") == 2
    assert ctas_per_sm(dataclasses.replace(taken, warps=4), "gfx950") == 4


def streaming(load: str, store: str, stores: int) -> Traffic:
    """Return a program that turns int8 codes to float16, 512 elements by the 32 lanes of a warp."""
    size = 1 << 20
    tensors = {
        "codes": torch.empty(size, dtype=torch.int8, device="meta"),
        "scales": torch.empty(size // 64, dtype=torch.float32, device="meta"),
        "out": torch.empty(size, dtype=torch.float16, device="meta"),
    }
    code = program(load, "LDG.E R8, [R4.64]", *[store] * stores, "EXIT")
    usage = {"REG": 32, "STACK": 0, "LOCAL": 0}
    taken = sass_resources(code, usage, shared_bytes=0, warps=1)
    return traffic(taken, Launch(None, (size // 512,), tensors, {}, num_warps=1))


def test_traffic_of_wide_accesses_is_the_minimum() -> None:
    found = streaming("LDG.E.128 R0, [R2]", "STG.E.128 [R2], R4", stores=2)
    assert found.minimum == (1 << 20) * 3 + (1 << 20) // 64 * 4
    assert found.excess == 0
    assert found.wide


def test_traffic_of_narrow_and_of_repeated_accesses() -> None:
    narrow = streaming("LDG.E.128 R0, [R2]", "STG.E.64 [R2], R4", stores=4)
    assert (narrow.excess, narrow.wide) == (0, False)
    repeated = streaming("LDG.E.128 R0, [R2]", "STG.E.128 [R2], R4", stores=4)
    assert repeated.excess == pytest.approx(2 / 3, abs=0.02)
    assert not streaming("LDG.E.64 R0, [R2]", "STG.E.128 [R2], R4", stores=2).wide
