"""Toy kernels compiled to real binaries, and what is read from them."""

from typing import Any

import pytest

from bench.static.compile import InterpretedKernelError
from bench.static.shipped import measure_all
from tests.bench.compiled import records, run

NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
MODELLED = ("sm_80", "sm_90", "sm_120")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """By (architecture, kernel)."""
    found = records("tests.bench.compiled", session=tmp_path_factory)
    return {(record["arch"], record["kernel"]): record for record in found}


@pytest.mark.parametrize("arch", NVIDIA)
def test_control_words_guard_every_late_result(compiled: Any, arch: str) -> None:
    record = compiled[arch, "product"]
    assert record["guarded"] > 50
    assert record["violations"] == 0


@pytest.mark.parametrize(
    ("arch", "opcode"),
    [
        ("sm_80", "HMMA"),
        ("sm_90", "HGMMA"),
        ("sm_100", "UTCHMMA"),
        ("sm_120", "HMMA"),
        ("gfx942", "v_mfma_f32_32x32x8_bf16"),
    ],
)
def test_tensor_cores_and_wide_loads(compiled: Any, arch: str, opcode: str) -> None:
    taken = compiled[arch, "product"]["resources"]
    assert set(taken["tensor"]) == {opcode}
    assert set(taken["loads"]) == {"128"}
    assert taken["spills"] == taken["stack_bytes"] == 0
    assert 64 <= taken["registers"] <= 256
    assert compiled[arch, "product"]["ctas"] >= 1


@pytest.mark.parametrize("arch", MODELLED)
def test_the_loop_multiplies_its_tile_once(compiled: Any, arch: str) -> None:
    use = compiled[arch, "product"]["utilization"]
    assert use["iterations"] == 1  # a loop of other multiplications would have been refused
    assert 0.5 < use["alone"] <= use["tensor"] + 0.01 <= 1.02


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_what_has_no_model_has_no_utilization(compiled: Any, arch: str) -> None:
    assert compiled[arch, "product"]["utilization"] is None


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
    assert "TRITON_INTERPRET is '1' and must be unset" in done.stderr


def test_the_gate_refuses_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InterpretedKernelError, match="must be unset"):
        measure_all(["sm_80"], None, 1)
