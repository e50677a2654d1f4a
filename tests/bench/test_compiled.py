"""Toy kernels compiled to real binaries, and what is read from them."""

from typing import Any

import pytest

from bench.static.shipped import measure_all
from qlora_compile.errors import InterpretedKernelError
from tests.bench.compiled import records, run

PRODUCTS = [
    ("sm_80", "HMMA"),
    ("sm_90", "HGMMA"),
    ("sm_100", "UTCHMMA"),
    ("sm_120", "HMMA"),
    ("gfx942", "v_mfma_f32_32x32x8_bf16"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """By (architecture, kernel)."""
    found = records("tests.bench.compiled", session=tmp_path_factory)
    return {(record["arch"], record["kernel"]): record for record in found}


@pytest.mark.parametrize(("arch", "opcode"), PRODUCTS)
def test_tensor_cores_and_wide_loads(compiled: Any, arch: str, opcode: str) -> None:
    taken = compiled[arch, "product"]["resources"]
    assert set(taken["tensor"]) == {opcode}
    assert set(taken["loads"]) == {"128"}
    assert taken["spills"] == taken["stack_bytes"] == 0
    assert 64 <= taken["registers"] <= 256
    assert compiled[arch, "product"]["ctas"] >= 1


@pytest.mark.parametrize("arch", [arch for arch, _ in PRODUCTS])
def test_bytes_are_not_counted_where_there_is_a_loop(compiled: Any, arch: str) -> None:
    assert compiled[arch, "product"]["traffic"] is None


def test_streaming_kernels(compiled: Any) -> None:
    good = compiled["sm_80", "widen"]["traffic"]
    assert good["moved"] == good["minimum"]
    assert good["wide"]
    bad = compiled["sm_80", "widen_badly"]
    assert not bad["traffic"]["wide"]
    assert max(map(int, bad["resources"]["stores"])) < 128


def test_spilling_is_seen(compiled: Any) -> None:
    taken = compiled["sm_80", "crowded"]["resources"]
    assert taken["registers"] <= 64
    assert taken["spills"] > 0
    assert taken["stack_bytes"] > 0


def test_interpreted_kernels_are_refused() -> None:
    done = run("tests.bench.compiled", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET is '1'; unset it" in done.stderr


def test_the_gate_refuses_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InterpretedKernelError, match="unset it"):
        measure_all(["sm_80"], None, 1)
