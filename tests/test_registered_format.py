"""A format that only the tests have is tuned, built and reported like the shipped ones.

The property suites of tests/kernels range over it because conftest.py registers it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_compile
from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.tuning import tuner as module
from qlora_compile.tuning.fingerprint import established
from qlora_compile.tuning.store import RecordStore
from tests.test_equality import lora, without_inductor
from tests.toy_models import tokens, toy
from tests.tuning.records import real_problem
from tests.tuning.test_tuner import tuner
from tests.zero_point_format import ZeroPointFormat

__all__ = ["without_inductor"]

ROOT = Path(__file__).parents[1]
NAME = ZeroPointFormat.name


@pytest.mark.usefixtures("without_inductor")
def test_a_model_is_packed_trained_and_reported() -> None:
    ids = tokens()
    stock = toy()
    ours = qlora_compile.optimize(
        toy(), lora(init_lora_weights=True), quantize=NAME, verify=True, strict=True
    ).train()
    loss = ours(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    for name, layer in ours.base_model.model.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = stock.get_submodule(name.replace(".base_layer", "")).weight
            weight.data = layer.dequantize()
    expected = stock(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    report = qlora_compile.explain(ours)
    assert not report.mismatches
    assert {site.format for site in report.sites if site.fused} == {NAME}


def test_the_tuner_measures_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured_cpu", lambda folder, caution: None)
    problem = real_problem(layout=format_named(NAME).layout((24, 64), group_size=32))
    made = tuner(tmp_path)
    made.ensure([problem])
    record = RecordStore(tmp_path).find(problem, established("cpu"))
    assert record is not None
    assert record.problem == problem
    assert made.selector.select(problem).measured is not None


_BUILD = f"""
import json, sys
from pathlib import Path
from qlora_compile.build import build
from qlora_compile.cli.shapes import parse_shapes
from qlora_compile.kernels.formats.formats import register
from qlora_compile.cli.training_problems import problems_of_shapes
from tests.zero_point_format import ZeroPointFormat

register(ZeroPointFormat())
problems = problems_of_shapes(parse_shapes("64x128x128x0"), {NAME!r}, dropout=False)
for arch in sys.argv[2:]:
    kernels = build(problems, arch, Path(sys.argv[1], arch), limit=2)
    print(json.dumps([kernel.name for kernel in kernels]))
"""


def test_kernels_are_built_for_it(tmp_path: Path) -> None:
    """In a process whose Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", _BUILD, str(tmp_path), "sm_90", "gfx942"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    for line in done.stdout.splitlines()[-2:]:
        # The kernels of adapters, which decode nothing, are those of every format.
        assert set(json.loads(line)) == {"dequantize_kernel", "gemm_kernel"}
