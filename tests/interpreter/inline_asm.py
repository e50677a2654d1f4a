"""`tl.inline_asm_elementwise` in Triton's interpreter, by emulating the PTX.

Elements are packed into registers as Triton's NVIDIA backend does it: elements below 32 bits share
a register as far as `pack` goes, and one invocation takes `pack` consecutive elements. Where an
integer is narrower than its register, the bits above are undefined, and filled with ones here.

Assembly that gets only scalars may give each lane its own value (it reads `%laneid`). Such a
value can be splatted and handed to further assembly, where `shfl.sync` reads it; anything else
that a kernel does to it raises.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.interpreter import ptx
from tests.interpreter.ptx_operands import WARP, PtxError, unsigned
from tests.interpreter.replacement import replaced

_REGISTER_WIDTHS = {"h": 16, "r": 32, "l": 64, "f": 32, "d": 64}


class LaneVarying(TensorHandle):
    """A scalar, possibly splatted to `shape`, whose value differs between the lanes of a warp.

    `lanes` holds its bits, uint of shape [1, 32].
    """

    def __init__(self, lanes: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> None:
        self.lanes, self.dtype, self.shape, self.attr = lanes, dtype, shape, {}

    @property
    def data(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise PtxError(
            "a value that differs between the lanes of a warp is used outside of inline assembly"
        )


class _Results:
    """Looks like the multi-result operation that Triton's builder returns."""

    def __init__(self, handles: list[TensorHandle]) -> None:
        self.get_result = handles.__getitem__


def parse_constraints(constraints: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the widths in bits of the output and of the input registers."""
    outputs, inputs = [], []
    for constraint in constraints.split(","):
        match = re.fullmatch(r"\s*(=&?)?([hrlfd])\s*", constraint)
        if match is None:
            raise PtxError(f"unknown constraint {constraint!r} in {constraints!r}")
        if match[1] and inputs:
            raise PtxError(f"an output after an input in {constraints!r}")
        (outputs if match[1] else inputs).append(_REGISTER_WIDTHS[match[2]])
    return tuple(outputs), tuple(inputs)


def elements_per_register(dtype: np.dtype, pack: int) -> int:
    return min(max(1, 4 // dtype.itemsize), pack)


def to_registers(
    handle: TensorHandle, pack: int, widths: Sequence[int], first: int
) -> list[np.ndarray]:
    """Return the bits of the registers that hold a tensor, each [invocations, 1] (or [1, 32])."""
    if isinstance(handle, LaneVarying):
        if elements_per_register(handle.lanes.dtype, pack) > 1:
            raise PtxError("lane-varying values below 32 bits cannot share a register")
        registers = [handle.lanes] * pack
        is_integer = handle.dtype.is_int()
    else:
        flat = np.ascontiguousarray(handle.data).reshape(-1, pack)
        if flat.dtype == np.bool_:
            raise PtxError("int1 operands of inline assembly are not emulated")
        each = elements_per_register(flat.dtype, pack)
        words = flat.view(unsigned(each * flat.dtype.itemsize * 8))
        registers = [np.ascontiguousarray(words[:, n : n + 1]) for n in range(words.shape[1])]
        is_integer = handle.dtype.scalar.is_int() or each > 1
    for number, register in enumerate(registers):
        index = first + number
        if index >= len(widths):
            raise PtxError(f"more operand registers than the {len(widths)} in the constraints")
        bits = register.dtype.itemsize * 8
        if bits > widths[index] or (bits < widths[index] and not is_integer):
            raise PtxError(f"an operand of {bits} bits in a register of {widths[index]}")
        if bits < widths[index]:
            wide = unsigned(widths[index])
            undefined = wide.type(np.iinfo(wide).max - np.iinfo(register.dtype).max)
            registers[number] = register.astype(wide) | undefined
    return registers


def from_registers(
    registers: list[np.ndarray], dtype: Any, pack: int, shape: tuple[int, ...], lanes: bool
) -> TensorHandle:
    """Return a tensor of `shape` from its registers, the inverse of `to_registers`.

    `lanes` says whether the assembly had only scalars, so that lanes may differ.
    """
    numpy_dtype = interpreter._get_np_dtype(dtype)
    each = elements_per_register(numpy_dtype, pack)
    word = unsigned(each * numpy_dtype.itemsize * 8)
    words = []
    for register in registers:
        if word.itemsize > register.dtype.itemsize or (
            word.itemsize < register.dtype.itemsize and not dtype.scalar.is_int()
        ):
            raise PtxError(
                f"a result of {each} × {dtype.scalar} in a register of "
                f"{register.dtype.itemsize * 8} bits"
            )
        bits = register.astype(word, copy=False)
        if bits.shape[1] == WARP:
            if (bits == bits[:, :1]).all():
                bits = bits[:, :1]
            elif lanes and len(registers) == 1 and pack == 1:
                return LaneVarying(bits, dtype.scalar, shape)
            else:
                raise PtxError("an element's result differs between the lanes of a warp")
        words.append(np.broadcast_to(bits, (int(np.prod(shape)) // pack, 1)))
    data = np.concatenate(words, axis=1).view(numpy_dtype)
    return TensorHandle(data.reshape(shape), dtype.scalar)


def _inline_asm(
    builder: Any,
    assembly: str,
    constraints: str,
    operands: list[TensorHandle],
    result_types: list[Any],
    is_pure: bool,
    pack: int,
) -> _Results:
    output_widths, input_widths = parse_constraints(constraints)
    shape: tuple[int, ...] = (1,)
    if operands:
        first = operands[0]
        shape = first.shape if isinstance(first, LaneVarying) else first.data.shape
    if np.prod(shape) % pack:
        raise PtxError(f"{np.prod(shape)} elements do not divide into invocations of {pack}")
    registers: list[np.ndarray] = []
    for operand in operands:
        registers += to_registers(operand, pack, input_widths, len(registers))
    if len(registers) != len(input_widths):
        raise PtxError(f"{len(registers)} operand registers, {len(input_widths)} constraints")

    def load(addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
        element = getattr(tl, f"{'int' if dtype.kind == 'i' else 'uint'}{dtype.itemsize * 8}")
        pointer = TensorHandle(addresses, tl.pointer_type(element))
        return builder.create_load(pointer, None, False).data

    program = ptx.parse(assembly, output_widths, input_widths)
    outputs = program.run(registers, load)
    scalars = not any(dtype.is_block() for dtype in result_types)
    handles, position = [], 0
    for dtype in result_types:
        count = pack // elements_per_register(interpreter._get_np_dtype(dtype), pack)
        mine = outputs[position : position + count]
        if len(mine) < count:
            raise PtxError(f"{len(outputs)} output registers are too few for {constraints!r}")
        handles.append(from_registers(mine, dtype, pack, shape, scalars))
        position += count
    if position != len(outputs):
        raise PtxError(f"{len(outputs)} output registers, {position} used by the result types")
    return _Results(handles)


@contextlib.contextmanager
def inline_assembly() -> Iterator[None]:
    """While active, `tl.inline_asm_elementwise` runs its PTX; see the module."""
    splat, broadcast = InterpreterBuilder.create_splat, InterpreterBuilder.create_broadcast

    def lane_splat(builder: Any, result_type: Any, operand: TensorHandle) -> TensorHandle:
        if isinstance(operand, LaneVarying):
            return LaneVarying(operand.lanes, operand.dtype, tuple(result_type.shape))
        return splat(builder, result_type, operand)

    def lane_broadcast(builder: Any, operand: TensorHandle, shape: Sequence[int]) -> TensorHandle:
        if isinstance(operand, LaneVarying):
            return LaneVarying(operand.lanes, operand.dtype, tuple(shape))
        return broadcast(builder, operand, shape)

    with replaced(
        InterpreterBuilder,
        create_inline_asm=_inline_asm,
        create_splat=lane_splat,
        create_broadcast=lane_broadcast,
    ):
        yield
