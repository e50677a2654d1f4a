"""How Triton's interpreter launches a kernel: arguments, language, loops, integers, errors.

Upstream patches `triton.language` anew for each launch and for each call of a device function,
which costs more than a small kernel itself. Here the patches are collected once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import (
    FunctionRewriter,
    GridExecutor,
    InterpretedFunction,
    TensorHandle,
    interpreter_builder,
    interpreter_semantic,
)
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.interpreter.loops import RANGE_NAME, LoopTransformer, loop_range
from tests.interpreter.memory import InvalidAccess, MemoryGuard
from tests.interpreter.ptx_operands import PtxError
from tests.interpreter.replacement import replaced

_rewritten: dict[Callable, Callable] = {}


class IntegerOverflow(RuntimeError):
    """A signed addition, subtraction or product that does not fit its type."""


@functools.cache
def _language_patches() -> list[tuple[object, dict[str, object]]]:
    """Return what upstream replaces in `triton.language` while a kernel runs, by owner."""
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(everything)
    patches: dict[int, tuple[object, dict[str, object]]] = {}
    for owner, name, _ in scope._changes:
        patches.setdefault(id(owner), (owner, {}))[1][name] = vars(owner)[name]
    scope.restore()
    for module in (tl, tl.core):
        patches[id(module)][1]["range"] = loop_range
    return list(patches.values())


def check_overflow(left: Any, right: Any, operation: Callable) -> None:
    """Check for overflow in place of upstream, which computes in int64 and discards the answer.

    Unsigned arithmetic, and `tl.add`, … with `sanitize_overflow=False`, may wrap.
    """
    dtype = left.type.scalar
    if dtype.int_bitwidth >= 64 or not dtype.is_int_signed():
        return
    name = operation.__name__
    lowest, highest = _bounds(name, _extremes(left.handle.data), _extremes(right.handle.data))
    limits = dtype.get_int_min_value(), dtype.get_int_max_value()
    if limits[0] <= lowest and highest <= limits[1]:
        return
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    values = exact(left.handle.data, right.handle.data, dtype=np.int64)
    wrong = (values < limits[0]) | (values > limits[1])
    if wrong.any():
        raise IntegerOverflow(
            f"{dtype} overflow: {name} gives {values[wrong][0]}; cast an operand to tl.int64 first"
        )


def _extremes(values: np.ndarray) -> tuple[int, int]:
    # One along an axis that broadcasting repeated.
    distinct = values[tuple(slice(None) if stride else 0 for stride in values.strides)]
    lowest = int(distinct.min())
    return lowest, lowest if distinct.size == 1 else int(distinct.max())


def _bounds(name: str, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Return the integers between which all results of an operation on two ranges lie."""
    if name == "add":
        return a[0] + b[0], a[1] + b[1]
    if name == "sub":
        return a[0] - b[1], a[1] - b[0]
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


class _Arguments:
    """Turns what the caller passed into what a kernel sees, as a compiled launch does."""

    def __init__(self, guard: MemoryGuard, not_specialized: set[str]) -> None:
        self.guard = guard
        self.not_specialized = not_specialized

    def convert(self, value: Any, name: str) -> Any:
        """Convert an argument; a Python 1, when compiled a constexpr, stays unless `name` is
        exempt."""
        if isinstance(value, float):
            # Upstream leaves a float a Python number, which adapts to any tensor's dtype.
            return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        if isinstance(value, tuple):
            return interpreter._tuple_create(value, (self.convert(part, name) for part in value))
        if isinstance(value, TensorDescriptor):
            return self.descriptor(value, name)
        if type(value) is int and value == 1 and name not in self.not_specialized:
            return value
        converted = interpreter._implicit_cvt(value)
        if isinstance(value, (torch.Tensor, TensorWrapper)):
            tensor = value.base if isinstance(value, TensorWrapper) else value
            address = self.guard.tagged_address(tensor, f"{name} {list(tensor.shape)}")
            converted.handle.data[0] = address
        return converted

    def descriptor(self, value: TensorDescriptor, name: str) -> Any:
        descriptor = interpreter_semantic.make_tensor_descriptor(
            base=self.convert(value.base, name),
            shape=[interpreter._implicit_cvt(int(size)) for size in value.shape],
            strides=[
                *(interpreter._implicit_cvt(int(stride)) for stride in value.strides[:-1]),
                tl.constexpr(value.strides[-1]),
            ],
            block_shape=[tl.constexpr(size) for size in value.block_shape],
            padding_option=value.padding,
        )
        descriptor.handle.round_f32_to_tf32 = value.round_f32_to_tf32
        return descriptor


def _not_specialized(function: InterpretedFunction) -> set[str]:
    """Return names of the arguments whose values a compiled launch does not look at."""
    exempt = function.kwargs.get("do_not_specialize") or ()
    return {function.arg_names[key] if isinstance(key, int) else key for key in exempt}


def _run_grid(
    executor: Any, arguments: _Arguments, args: list[Any], kwargs: dict[str, Any]
) -> None:
    values = {
        name: value if name in executor.constexprs else arguments.convert(value, name)
        for name, value in inspect.getcallargs(executor.fn, *args, **kwargs).items()
    }
    grid: Any = executor.grid(values) if callable(executor.grid) else executor.grid
    if len(grid) > 3:
        raise ValueError(f"a grid has at most 3 dimensions, not {len(grid)}")
    grid = tuple(int(size) for size in grid) + (1,) * (3 - len(grid))
    interpreter_builder.set_grid_dim(*grid)
    for program in np.ndindex(*grid):
        interpreter_builder.set_grid_idx(*program)
        try:
            executor.fn(**values)
        except (InvalidAccess, IntegerOverflow, PtxError) as error:
            where = f"in program {program} of {executor.fn.__name__}"
            raise type(error)(f"{error}; {where}") from error
        except Exception as error:
            raise InterpreterError(repr(error)) from error


@contextlib.contextmanager
def honest_launches(guard: MemoryGuard) -> Iterator[None]:
    """While active, kernels launch as described in this module, their memory under `guard`.

    A kernel's `InvalidAccess`, `IntegerOverflow` and `PtxError` reach the caller as they are; other
    errors come as Triton's `InterpreterError`. Floating-point warnings of numpy are silent.
    """
    patches = _language_patches()
    running = False

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not running:
            raise RuntimeError(f"{self.fn.__name__} is called from outside of a kernel")
        return self.rewrite()(*args, **kwargs)

    def rewrite(self: Any) -> Callable:
        if self.fn not in _rewritten:
            _rewritten[self.fn] = self.rewriter.rewrite_ast()
        return _rewritten[self.fn]

    def run(self: Any, *args_dev: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        nonlocal running
        if warmup:
            return
        executor = GridExecutor(self.rewrite(), self.arg_names, grid)
        # Options such as num_warps are for the compiler.
        kwargs = {name: value for name, value in kwargs.items() if name in self.arg_names}
        args_hst, kwargs_hst = executor._init_args_hst(args_dev, kwargs)
        for hook in self.pre_run_hooks:
            hook(*args_hst, **kwargs_hst)
        with contextlib.ExitStack() as stack:
            stack.enter_context(np.errstate(all="ignore"))
            stack.enter_context(guard.launch())
            for owner, values in patches:
                stack.enter_context(replaced(owner, **values))
            running = True
            try:
                _run_grid(executor, _Arguments(guard, _not_specialized(self)), args_hst, kwargs_hst)
            finally:
                running = False
        executor._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    with (
        replaced(InterpretedFunction, __call__=call_device_function, rewrite=rewrite, run=run),
        replaced(FunctionRewriter, ast_transformer=LoopTransformer()),
        replaced(interpreter, **{RANGE_NAME: loop_range}),
        replaced(interpreter_semantic, binary_op_sanitize_overflow_impl=check_overflow),
    ):
        yield
