"""One shipped launch of every kernel, compiled: the fast part of `make bench-static`."""

from typing import Any

import pytest

from tests.bench.compiled import records
from tests.bench.shipped_subset import KERNELS

ARCHS = ("sm_80", "sm_90", "gfx942")
TENSOR = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}


@pytest.fixture(scope="module", params=ARCHS)
def shipped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict[str, Any]]]:
    """(architecture, rows)."""
    arch = request.param
    return arch, records("tests.bench.shipped_subset", arch, session=tmp_path_factory)


def test_every_kernel_is_shipped(shipped: Any) -> None:
    _, rows = shipped
    assert {row["kernel"] for row in rows} == set(KERNELS)


def test_nothing_spills_and_everything_fits(shipped: Any) -> None:
    _, rows = shipped
    for row in rows:
        taken = row["figures"]["resources"]
        assert (taken["spills"], taken["stack_bytes"]) == (0, 0), row
        assert row["figures"]["ctas"] >= 1, row


def test_large_products_run_on_tensor_cores(shipped: Any) -> None:
    arch, rows = shipped
    products = [row for row in rows if row["kernel"].startswith(("fused", "tail"))]
    assert len(products) == 4
    for row in products:
        opcodes = row["figures"]["resources"]["tensor"]
        assert any(opcode.startswith(TENSOR[arch]) for opcode in opcodes), row


def test_streams_are_wide(shipped: Any) -> None:
    arch, rows = shipped
    (row,) = [row for row in rows if row["kernel"] == "dequantize"]
    taken = row["figures"]["resources"]
    assert set(taken["stores"]) == {"128"}
    assert "128" in taken["loads"]
    if arch.startswith("sm"):
        moved = row["figures"]["traffic"]
        assert moved["wide"]
        assert moved["moved"] == pytest.approx(moved["minimum"], rel=0.01)


def test_the_main_loops_are_found_and_modelled(shipped: Any) -> None:
    arch, rows = shipped
    for row in rows:
        if row["kernel"].startswith(("fused", "tail")):
            use = row["figures"]["utilization"]
            if arch == "gfx942":
                assert use is None
            else:
                assert 0.3 < use["tensor"] <= 1.01, row
