"""One shipped launch of every kernel and the experts', compiled: a part of `make bench-static`, and
checks that it lacks."""

from typing import Any

import pytest

from tests.bench.compiled import records
from tests.bench.shipped_subset import EXPERTS, KERNELS

TENSOR = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}


@pytest.fixture(scope="module", params=TENSOR)
def shipped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict[str, Any]]]:
    """(architecture, rows)."""
    arch = request.param
    return arch, records("tests.bench.shipped_subset", arch, session=tmp_path_factory)


def test_every_kernel_is_shipped(shipped: Any) -> None:
    _, rows = shipped
    assert {row["kernel"] for row in rows} == {*KERNELS, *(f"experts {name}" for name in EXPERTS)}
    assert len(rows) == len(KERNELS) + 1 + 12


def test_nothing_spills_and_everything_fits(shipped: Any) -> None:
    _, rows = shipped
    for row in rows:
        taken = row["resources"]
        assert (taken["spills"], taken["stack_bytes"]) == (0, 0), row
        assert row["ctas"] >= 1, row


def test_products_run_on_tensor_cores(shipped: Any) -> None:
    arch, rows = shipped
    products = [row for row in rows if row["kernel"].startswith(("fused", "tail", "experts"))]
    assert len(products) == 4 + 1 + 12
    for row in products:
        opcodes = row["resources"]["tensor"]
        assert opcodes, row
        # The experts' thin products may be too small for the widest instruction.
        if row["kernel"].endswith("ward"):
            assert any(opcode.startswith(TENSOR[arch]) for opcode in opcodes), row


def test_streams_are_wide(shipped: Any) -> None:
    arch, rows = shipped
    (row,) = [row for row in rows if row["kernel"] == "dequantize"]
    taken = row["resources"]
    assert set(taken["stores"]) == {"128"}
    assert "128" in taken["loads"]
    if arch.startswith("sm"):
        moved = row["traffic"]
        assert moved["wide"]
        assert moved["moved"] == pytest.approx(moved["minimum"], rel=0.01)
