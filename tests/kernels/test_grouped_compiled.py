"""The experts' products, compiled for real GPUs with the configs that ship."""

import pytest

from tests.bench.compiled import records

TENSOR = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}


@pytest.mark.parametrize("arch", list(TENSOR))
def test_nothing_spills_and_products_run_on_tensor_cores(
    arch: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = records("tests.kernels.grouped_compiled", arch, session=tmp_path_factory)
    assert len(rows) == 11
    for row in rows:
        taken = row["resources"]
        assert (taken["spills"], taken["stack_bytes"]) == (0, 0), row
        assert row["ctas"] >= 1, row
        opcodes = taken["tensor"]
        if row["launch"] in ("forward", "backward"):
            assert any(opcode.startswith(TENSOR[arch]) for opcode in opcodes), row
        assert opcodes, row
