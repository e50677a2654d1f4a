"""A vectorised emulator for the PTX in inline assembly: all elements and all 32 lanes at once.

A register holds its bits as an unsigned array of shape [elements or 1, 32 or 1]: the second axis
is there only where the lanes of a warp hold different values. Which lane an element of a block
lives on is up to the compiler, so a shuffle may read only what does not depend on the element.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.interpreter.ptx_instructions import INSTRUCTIONS
from tests.interpreter.ptx_operands import (
    LANES,
    WARP,
    PtxError,
    expect,
    immediate,
    numpy_dtype,
    shuffle_origins,
    split_vector,
    unsigned,
)

Bits = np.ndarray
Load = Callable[[np.ndarray, np.dtype], np.ndarray]  # addresses (uint64), dtype -> values
Step = Callable[[list[Bits], Load], Bits | tuple[Bits, ...]]

_REGISTER = re.compile(r"[A-Za-z_%$][\w$]*")
_LOADS = re.compile(r"ld\.global(?:\.nc)?\.([busf](8|16|32|64))")
_MOVES = re.compile(r"mov\.[busf](16|32|64)")


@dataclass(frozen=True)
class Program:
    """Parsed assembly. `run` takes the inputs' bits and returns the outputs' bits."""

    registers: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[tuple[str, Step, tuple[int, ...]], ...]

    def run(self, inputs: Sequence[Bits], load: Load) -> list[Bits]:
        state: list = [None] * self.registers
        for register, bits in zip(self.inputs, inputs, strict=True):
            state[register] = bits
        for text, step, targets in self.steps:
            try:
                results = step(state, load)
            except PtxError as error:
                raise PtxError(f"{error}, in `{text}`") from None
            if len(targets) == 1:
                state[targets[0]] = results
            else:
                for target, result in zip(targets, results, strict=True):
                    state[target] = result
        return [state[register] for register in self.outputs]


@functools.cache
def parse(assembly: str, output_widths: tuple[int, ...], input_widths: tuple[int, ...]) -> Program:
    """Parse assembly. `$0`, `$1`, … are the outputs, then the inputs, registers of these widths in
    bits."""
    return _Parser(output_widths, input_widths).parse(assembly)


@dataclass
class _Parser:
    output_widths: tuple[int, ...]
    input_widths: tuple[int, ...]
    widths: list[int] = field(default_factory=list)  # by register number
    written: set[int] = field(default_factory=set)
    steps: list[tuple[str, Step, tuple[int, ...]]] = field(default_factory=list)

    def parse(self, assembly: str) -> Program:
        arguments = self.output_widths + self.input_widths
        self.scopes: list[dict[str, int]] = [{}]
        for number, width in enumerate(arguments):
            self.declare(f"${number}", width)
        outputs = range(len(self.output_widths))
        self.inputs = range(len(outputs), len(arguments))
        self.written.update(self.inputs)
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", assembly, flags=re.DOTALL).strip()
        while text:
            if text[0] in "{}":
                if text[0] == "{":
                    self.scopes.append({})
                elif len(self.scopes) > 1:
                    self.scopes.pop()
                else:
                    raise PtxError("a } too many in inline assembly")
                text = text[1:].strip()
                continue
            statement, semicolon, text = text.partition(";")
            if not semicolon:
                raise PtxError(f"no semicolon after `{statement.strip()}`")
            self.statement(" ".join(statement.split()))
            text = text.strip()
        if len(self.scopes) > 1:
            raise PtxError("a { without its } in inline assembly")
        for output in outputs:
            if output not in self.written:
                raise PtxError(f"the output ${output} is never written")
        return Program(len(self.widths), tuple(self.inputs), tuple(outputs), tuple(self.steps))

    def declare(self, name: str, width: int) -> None:
        self.scopes[-1][name] = len(self.widths)
        self.widths.append(width)

    def statement(self, text: str) -> None:
        if not text:
            return
        mnemonic, _, rest = text.partition(" ")
        try:
            if mnemonic == ".reg":
                self.registers(rest)
                return
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
            step, targets = self.instruction(mnemonic, [operand.strip() for operand in operands])
        except PtxError as error:
            raise PtxError(f"{error}, in `{text}`") from None
        for target in targets:
            if target in self.inputs:
                raise PtxError(f"the input ${target} is overwritten, in `{text}`")
        self.written.update(targets)
        self.steps.append((text, step, targets))

    def registers(self, rest: str) -> None:
        if len(self.scopes) == 1:
            raise PtxError(
                "a register declared outside of { } is declared twice when the compiler repeats "
                "the assembly"
            )
        kind, _, names = rest.partition(" ")
        match = re.fullmatch(r"\.[busf](8|16|32|64)", kind)
        if match is None:
            raise PtxError(f"unknown register type {kind}")
        for name in names.split(","):
            many = re.fullmatch(r"(\S+)<(\d+)>", name.strip())
            each = [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [name.strip()]
            for one in each:
                if one in self.scopes[-1]:
                    raise PtxError(f"register {one} is declared twice")
                self.declare(one, int(match[1]))

    def register(self, name: str, width: int, *, wider: bool = False) -> int:
        """Return the number of a declared register of `width` bits, or of more if `wider`."""
        for scope in reversed(self.scopes):
            if name in scope:
                number = scope[name]
                actual = self.widths[number]
                if actual != width and not (wider and actual > width):
                    raise PtxError(f"{name} has {actual} bits where {width} are needed")
                return number
        raise PtxError(f"{name} is not declared")

    def source(self, name: str, width: int, *, wider: bool = False) -> Callable[[list[Bits]], Bits]:
        """Return how to read an operand's `width` bits."""
        dtype = unsigned(width)
        if name == "%laneid":
            if width != WARP:
                raise PtxError("%laneid has 32 bits")
            return lambda state: LANES
        if _REGISTER.fullmatch(name):
            number = self.register(name, width, wider=wider)
            if number not in self.written:
                raise PtxError(f"{name} is read before it is written")
            if self.widths[number] > width:
                return lambda state: state[number].astype(dtype)
            return lambda state: state[number]
        constant = np.full((1, 1), immediate(name, width), dtype)
        return lambda state: constant

    def instruction(self, mnemonic: str, operands: list[str]) -> tuple[Step, tuple[int, ...]]:
        if move := _MOVES.fullmatch(mnemonic):
            return self.move(int(move[1]), operands)
        if load := _LOADS.fullmatch(mnemonic):
            return self.load(load[1], operands)
        if mnemonic == "shfl.sync.idx.b32":
            return self.shuffle(operands)
        if mnemonic not in INSTRUCTIONS:
            raise PtxError(f"unknown instruction {mnemonic}")
        destination, sources, compute = INSTRUCTIONS[mnemonic]
        expect(operands, 1 + len(sources))
        converts = mnemonic.startswith("cvt.")
        reads = []
        for name, kind in zip(operands[1:], sources, strict=True):
            if kind == "immediate":
                number = np.full((1, 1), immediate(name, 32), np.uint32)
                reads.append((lambda state, number=number: number, number.dtype))
                continue
            view = numpy_dtype(kind)
            reads.append((self.source(name, view.itemsize * 8, wider=converts), view))
        to_dtype = numpy_dtype(destination)
        target = self.register(operands[0], to_dtype.itemsize * 8, wider=converts)
        width = self.widths[target]
        # A conversion into a wider register extends, by sign if the type has one.
        wide = np.dtype(f"{to_dtype.kind}{width // 8}")
        if wide != to_dtype and destination[0] not in "us":
            raise PtxError(
                f"{operands[0]} has {width} bits where {to_dtype.itemsize * 8} are needed"
            )

        def step(state: list[Bits], _: Load) -> Bits:
            result = compute(*(read(state).view(view) for read, view in reads))
            return np.asarray(result).astype(wide, copy=False).view(unsigned(width))

        return step, (target,)

    def move(self, width: int, operands: list[str]) -> tuple[Step, tuple[int, ...]]:
        expect(operands, 2)
        to, source = operands
        if to.startswith("{"):
            names = split_vector(to)
            part = unsigned(width // len(names))
            targets = tuple(self.register(name, width // len(names)) for name in names)
            read = self.source(source, width)

            def unpack(state: list[Bits], _: Load) -> tuple[Bits, ...]:
                whole = read(state)
                shifts = range(0, width, part.itemsize * 8)
                return tuple((whole >> whole.dtype.type(s)).astype(part) for s in shifts)

            return unpack, targets
        if source.startswith("{"):
            names = split_vector(source)
            part_width = width // len(names)
            reads = [self.source(name, part_width) for name in names]
            dtype = unsigned(width)

            def pack(state: list[Bits], _: Load) -> Bits:
                parts = (
                    read(state).astype(dtype) << dtype.type(n * part_width)
                    for n, read in enumerate(reads)
                )
                return functools.reduce(np.bitwise_or, parts)

            return pack, (self.register(to, width),)
        read = self.source(source, width)
        return lambda state, _: read(state), (self.register(to, width),)

    def load(self, kind: str, operands: list[str]) -> tuple[Step, tuple[int, ...]]:
        expect(operands, 2)
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(\w+)\s*)?\]", operands[1])
        if match is None:
            raise PtxError(f"{operands[1]} is not an address")
        read = self.source(match[1], 64)
        offset = np.uint64(int(match[2] or "0", 0))
        memory = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
        target = self.register(operands[0], memory.itemsize * 8, wider=kind[0] != "f")
        extended = np.dtype(f"{memory.kind}{self.widths[target] // 8}")

        def step(state: list[Bits], load: Load) -> Bits:
            values = load(read(state) + offset, memory)
            return values.astype(extended, copy=False).view(unsigned(self.widths[target]))

        return step, (target,)

    def shuffle(self, operands: list[str]) -> tuple[Step, tuple[int, ...]]:
        expect(operands, 5)
        to, table, lane, control, members = operands
        if immediate(members, 32) != 0xFFFFFFFF:
            raise PtxError("only shuffles of the whole warp are emulated")
        read_table, read_lane = self.source(table, 32), self.source(lane, 32)
        origin = shuffle_origins(immediate(control, 32))

        def step(state: list[Bits], _: Load) -> Bits:
            values = read_table(state)
            if values.shape[0] != 1:
                raise PtxError("shuffles a value that differs between elements")
            wanted = read_lane(state) & np.uint32(WARP - 1)
            picked = np.broadcast_to(values, (1, WARP))[0][origin]  # [wanted lane, own lane]
            if wanted.shape[1] == 1 and (picked == picked[:, :1]).all():
                return picked[:, 0][wanted]
            return picked[wanted, LANES]

        return step, (self.register(to, 32),)
