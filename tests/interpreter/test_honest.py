"""What `honest_interpreter` installs, refuses and restores."""

# Kernels annotate parameters tl.constexpr and are launched with plain values:
# pyright: reportArgumentType=false

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter.honest import check_version, honest_interpreter
from tests.interpreter.memory import InvalidAccess

ROOT = Path(__file__).parents[2]


@triton.jit
def round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


def attributes() -> dict[str, object]:
    owners = {
        "builder": interpreter.InterpreterBuilder,
        "reduce": interpreter.ReduceOps,
        "scan": interpreter.ScanOps,
        "executor": interpreter.GridExecutor,
        "function": interpreter.InterpretedFunction,
        "rewriter": interpreter.FunctionRewriter,
        "semantic": interpreter.interpreter_semantic,
        "module": interpreter,
        "block_type": tl.block_type,
        "tensor": tl.tensor,
        "tl": tl,
        "core": tl.core,
        "math": tl.math,
        "dtype": tl.dtype,
    }
    return {
        f"{name}.{key}": value
        for name, owner in owners.items()
        for key, value in vars(owner).items()
        if not key.startswith("__") or key in ("__init__", "__call__", "__index__", "__bool__")
    }


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version("3.9.0")
    message = "mends the interpreter of Triton 3.9.0, and this is Triton 3.10.0"
    with pytest.raises(RuntimeError, match=message):
        check_version("3.10.0")
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    with pytest.raises(RuntimeError, match=message), honest_interpreter():
        pass


def test_triton_must_have_been_imported_for_interpretation() -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    code = (
        "from tests.interpreter.honest import honest_interpreter\nwith honest_interpreter(): pass"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert "set TRITON_INTERPRET=1 in the environment before triton is imported" in process.stderr


def test_everything_is_restored() -> None:
    x, out = torch.tensor([1 + 2.0**-8 + 2.0**-12]), torch.zeros(1).bfloat16()
    before = attributes()
    with honest_interpreter():
        inside = attributes()
        round_kernel[(1,)](x, out, 1)
        assert out == x.bfloat16()
    assert attributes() == before
    assert inside != before


def test_everything_is_restored_after_an_error() -> None:
    before = attributes()
    with pytest.raises(KeyError), honest_interpreter():
        raise KeyError
    assert attributes() == before


def test_nesting_changes_nothing() -> None:
    with honest_interpreter() as outer:
        before = attributes()
        with honest_interpreter() as inner:
            assert inner is outer
            assert attributes() == before
        assert attributes() == before


def test_the_language_is_patched_only_while_a_kernel_runs() -> None:
    x, out = torch.zeros(1), torch.zeros(1).bfloat16()
    with honest_interpreter():
        before = attributes()
        round_kernel[(1,)](x, out, 1)
        with pytest.raises(InvalidAccess):
            round_kernel[(1,)](x, out, 2)
        assert attributes() == before
