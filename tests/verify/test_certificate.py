"""Certificates: kept by pattern, kernels and versions, found by exactly these, and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile
from qlora_compile.capture import backend
from qlora_compile.tuning.errors import RecordLineError
from qlora_compile.tuning.warning import RecordWarning
from qlora_compile.verify import verifier
from qlora_compile.verify.certificate import (
    Certificate,
    Comparison,
    from_line,
    to_line,
    versions_here,
)
from qlora_compile.verify.check import Checked
from qlora_compile.verify.store import CertificateStore
from tests.test_equality import lora, step
from tests.toy_models import tokens, toy


def certificate(**changed: Any) -> Certificate:
    compared = Comparison("real", "output 0", 2e-7, 1e-7, 4e-7)
    made = Certificate(
        pattern="abc",
        region="Block",
        kernels=("backward dense whole", "forward dense whole"),
        versions=versions_here("cpu"),
        device="cpu",
        dtype="float32",
        reference="float64",
        factor=4.0,
        comparisons=(compared, replace(compared, inputs="random", error=5e-8)),
    )
    return replace(made, **changed)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """One element for each check that was to be made; an empty cache, and nothing compiled."""
    made: list[int] = []

    def counting(*arguments: Any) -> Checked:
        made.append(1)
        return Checked(certificate().comparisons, "float64", torch.float32, None)

    monkeypatch.setattr(verifier, "check", counting)
    monkeypatch.setattr(backend, "compile_inner", lambda graph, inputs, *_: graph.forward)
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(tmp_path))
    return made


def run(length: int = 16, verify: Any = "once", **options: Any) -> tuple[Certificate, ...]:
    torch._dynamo.reset()
    options = {"quantize": "nf4", "tune": "model"} | options
    config = lora(r=options.pop("r", 4))
    model = qlora_compile.optimize(toy(num_hidden_layers=2), config, verify=verify, **options)
    step(model.train(), tokens(2, length))
    report = qlora_compile.explain(model)
    assert report.fused == 14
    return report.certificates


def test_once_checks_a_pattern_once_and_true_checks_always(checks: list[int]) -> None:
    first = run()
    # Two layers, one graph, one check.
    assert (len(first), len(checks)) == (1, 1)
    assert run() == first
    assert len(checks) == 1
    # Of a length that Problem rounds up to the same rows.
    assert run(length=15) == first
    assert len(checks) == 1
    (longer,) = run(length=17)
    (other_rank,) = run(r=5)
    (other_format,) = run(quantize="fp4")
    patterns = {first[0].pattern, longer.pattern, other_rank.pattern, other_format.pattern}
    assert len(patterns) == len(checks) == 4
    (again,) = run(verify=True)
    assert again.pattern == first[0].pattern
    assert len(checks) == 5


def test_a_certificate_of_other_versions_or_kernels_never_counts(
    checks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    here = versions_here("cpu")
    assert here is not None
    for other in (replace(here, peft="0"), replace(here, sources="0"), None):
        monkeypatch.setattr(verifier, "versions_here", lambda device, other=other: other)
        run()
    assert len(checks) == 4
    # What could not be established is not kept either.
    run()
    assert len(checks) == 5
    monkeypatch.setattr(verifier, "versions_here", versions_here)
    monkeypatch.setattr(verifier, "_kernels", lambda fused, source: ("forward another",))
    run()
    assert len(checks) == 6


def test_the_store_keeps_what_it_was_given_and_nothing_edited(tmp_path: Path) -> None:
    store, one = CertificateStore(tmp_path), certificate()
    other = certificate(pattern="def")
    assert one.key is not None
    assert store.find(one.key) is None
    for each in (one, other, one):
        store.append(each)
    assert set(CertificateStore(tmp_path).read().values()) == {one, other}
    newer = certificate(reference="float32")
    store.append(newer)
    assert store.find(one.key) == newer
    assert from_line(to_line(one)) == one
    (file,) = store.folder.glob("*.jsonl")
    file.write_text(file.read_text().replace('"float32","factor"', '"float32", "factor"'))
    file.write_text(file.read_text().replace("5e-08", "5e-09") + "{torn\n")
    with pytest.warns(RecordWarning, match="skipped"):
        assert store.read() == {}
    with pytest.raises(RecordLineError):
        from_line(to_line(one).replace("Block", "Other"))


def test_a_folder_that_cannot_be_written_warns(tmp_path: Path) -> None:
    (tmp_path / "certificates").write_text("a file")
    with pytest.warns(RecordWarning, match="certificates"):
        CertificateStore(tmp_path).append(certificate())


@pytest.mark.usefixtures("checks")
def test_the_report_tells_the_worst_ratio_and_what_it_was_checked_on() -> None:
    assert str(certificate()) == (
        "Block verified: worst ratio 2.00 (output 0, real); on real and random inputs"
    )
    model = qlora_compile.optimize(toy(), lora(), quantize="nf4", verify=True, tune="model")
    step(model.train(), tokens())
    report = qlora_compile.explain(model)
    data = json.loads(report.to_json())
    assert data["mismatches"] == []
    (told,) = data["certificates"]
    assert [each["ratio"] for each in told["comparisons"]] == pytest.approx([2.0, 0.5])
    assert "LlamaDecoderLayer verified: worst ratio 2.00 (" in str(report)
    assert told["versions"]["fingerprint"]["torch"].startswith(torch.__version__)
    assert told["kernels"] == sorted(set(told["kernels"]))
