"""`qlora-compile build` compiles what a GPU's JIT asks for, into a folder that can be moved.

Everything that compiles runs in separate processes, as this one may interpret its kernels.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from typer.testing import CliRunner

import qlora_compile
from qlora_compile import build as builder
from qlora_compile.cli.app import app
from qlora_compile.cli.model_problems import problems_of_model
from qlora_compile.cli.training_problems import problems_of_shapes
from tests.bench.compiled import run
from tests.toy_language_model import toy_llama

ARCH = "sm_90"
SHAPE = (32, 128, 256, 16)
SHAPES = "x".join(map(str, SHAPE))


def asked(folder: Path) -> dict[str, Any]:
    """Return what row counts from 17 to 32 ask of `folder`, by built_kernels_found.py."""
    arguments = (ARCH, SHAPES, "17", "32", "0.1")
    found = run("tests.cli.built_kernels_found", *arguments, TRITON_CACHE_DIR=str(folder))
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_a_gpu_finds_every_kernel_in_the_moved_folder(tmp_path: Path) -> None:
    built, moved = tmp_path / "built", tmp_path / "moved"
    options = ("--arch", ARCH, "--shapes", SHAPES, "--dropout", "0.1", "--candidates", "99")
    done = run("qlora_compile.cli.app", "build", *options, "--jobs", "2", "--output", str(built))
    assert done.returncode == 0, done.stderr
    assert f"Kernels for {ARCH}" in done.stdout
    assert f"export TRITON_CACHE_DIR={built}" in done.stdout

    manifest = json.loads((built / "build.json").read_text())
    assert manifest["arch"] == ARCH
    assert "ptxas" in manifest["compiler"]
    kernels = manifest["kernels"]
    assert {variant for kernel in kernels for variant in kernel["variants"]} == {
        "dense",
        "fused",
        "tail",
    }
    assert len(manifest["problems"]) == 4
    keys = [kernel["key"] for kernel in kernels]
    assert len(set(keys)) == len(keys) == len([path for path in built.iterdir() if path.is_dir()])

    built.rename(moved)
    # One of several of its name, which alone is missed then.
    binary, *others = moved.glob("*/low_rank_kernel.cubin")
    assert others
    binary.unlink()
    found = asked(moved)
    print(f"{found['launches']} launches of {found['kernels']} kernels, misses {found['misses']}")
    assert found["misses"] == ["low_rank_kernel"]
    # As many as were built: nothing was built that no number of rows needs.
    assert found["kernels"] == len(kernels)
    assert found["launches"] > 10 * found["kernels"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "sm_91"), "--arch 'sm_91' is unknown; choose one of sm_80, sm_86, sm_89"),
        (("--shapes", "1x2x3"), "--shapes: '1x2x3' is not four whole numbers; write MxNxKxR"),
        (("--format", "int4:zeros=no"), "zeros='no' is not possible with format 'int4'; use"),
        (("--format", "nf5"), "--format 'nf5' is unknown; the nearest is nf4 or nvfp4"),
        (("--model", "demo"), "both given; pass either --model or --shapes"),
        (("--shapes", "16x128x12x0"), "needs no Triton kernel on sm_90"),
        (("--output", __file__), "this is a file"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, options: tuple[str, str], message: str) -> None:
    given = {"--arch": ARCH, "--shapes": SHAPES, "--output": str(tmp_path / "new")}
    given |= dict([options])
    result = CliRunner().invoke(app, ["build", *(part for each in given.items() for part in each)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_neither_model_nor_shapes_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["build", "--arch", ARCH, "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr == "error: neither given; pass either --model or --shapes\n"


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles kernels here"
)
def test_interpreted_kernels_are_refused_in_one_line(tmp_path: Path) -> None:
    options = ("--arch", ARCH, "--shapes", SHAPES, "--output", str(tmp_path))
    result = CliRunner().invoke(app, ["build", *options])
    assert result.exit_code == 2
    assert "TRITON_INTERPRET is '1'; unset it" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_models_problems_are_those_of_its_fused_sites() -> None:
    config = LoraConfig(r=8, target_modules="all-linear")
    model = qlora_compile.optimize(toy_llama(), config, quantize="nf4", tune="model")
    found = problems_of_model(model, [48, 200], torch.bfloat16)
    shapes = [
        (m, n, k, 8)
        for m in (64, 256)
        for n, k in (((64, 32, 32), 64), ((64,), 64), ((128, 128), 64), ((64,), 128))
    ]
    expected = problems_of_shapes(shapes, "nf4", dropout=False)
    assert set(found) == set(expected)
    assert len(found) == len(expected)
    here = problems_of_model(model, [48])
    assert {problem.x_dtype for problem in here} == {torch.float32}
    assert {replace(problem, device="cpu").device for problem in here} == {"cpu"}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinities")
@pytest.mark.parametrize(("given", "jobs"), [((), 3), (("--jobs", "5"), 5)])
def test_as_many_jobs_as_cpus_that_the_command_may_use(
    given: tuple[str, ...], jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(builder, "build", lambda *_, **options: seen.append(options["jobs"]) or [])
    arguments = ["build", "--arch", ARCH, "--shapes", SHAPES, "--output", str(tmp_path), *given]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert seen == [jobs]
