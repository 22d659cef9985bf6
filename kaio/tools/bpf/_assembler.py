"""Instructions of the kernel's virtual machine, with labels and comments (Documentation/bpf/standardization).

Rules kept here: an instruction is written once, and both its bytes and its text come from it. A jump goes forward to a
label. No I/O.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import sys
from typing import Final

__all__ = ["Assembler", "Register"]

_LOAD_WORD: Final = 0x61  # BPF_LDX | BPF_MEM | BPF_W
_LOAD_BYTE: Final = 0x71
_LOAD_DOUBLE: Final = 0x79
_STORE_WORD: Final = 0x62  # BPF_ST | BPF_MEM | BPF_W: a constant
_ADD_IN_MEMORY: Final = 0xDB  # BPF_STX | BPF_ATOMIC | BPF_DW, with BPF_ADD as the constant
_LOAD_CONSTANT: Final = 0x18  # BPF_LD | BPF_IMM | BPF_DW: two slots
_MOVE: Final = 0xB7  # BPF_ALU64 | BPF_MOV | BPF_K
_MOVE_FROM: Final = 0xBF
_ADD: Final = 0x07
_FROM_NETWORK: Final = 0xDC  # BPF_ALU | BPF_END | BPF_TO_BE: the constant is the width in bits
_GO: Final = 0x05
_CALL: Final = 0x85
_EXIT: Final = 0x95
_JUMPS: Final = {"==": 0x15, "!=": 0x55, ">": 0x25, "<": 0xA5}
_JUMP_ABOVE: Final = 0x2D  # BPF_JMP | BPF_JGT | BPF_X
_PSEUDO_VALUE: Final = 2  # the constants are the descriptor of a map and a place in its value


class Register(enum.IntEnum):
    """The registers: `R0` has results, `R1` to `R5` arguments, which a call destroys; `R10` is the stack's end."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10

    def __str__(self) -> str:
        return self.name.lower()


@dataclasses.dataclass(slots=True)
class _Instruction:
    code: int
    text: str
    comment: str
    target: Register = Register.R0
    source: int = 0
    offset: int = 0
    constant: int = 0
    label: str = ""  # where a jump goes
    second: int | None = None  # the constant of the second slot, in a long instruction

    @property
    def slots(self) -> int:
        return 1 if self.second is None else 2

    def encode(self) -> bytes:
        # struct bpf_insn has two bit fields of four bits, whose order is that of the machine's bytes.
        registers = self.source << 4 | self.target if sys.byteorder == "little" else self.target << 4 | self.source
        first = struct.pack("=BBhi", self.code, registers, self.offset, self.constant)
        return first if self.second is None else first + struct.pack("=BBhi", 0, 0, 0, self.second)


class Assembler:
    """A program in the making: each method adds an instruction, `mark` names the place of the next one."""

    def __init__(self) -> None:
        self._instructions: list[_Instruction] = []
        self._labels: dict[str, int] = {}
        self._slots = 0

    def __len__(self) -> int:
        return self._slots

    # -- instructions

    def mark(self, label: str) -> None:
        """Name the place of the next instruction."""
        if label in self._labels:
            raise ValueError(f"label {label!r} is used twice")
        self._labels[label] = self._slots

    def load_word(self, target: Register, base: Register, offset: int, comment: str = "") -> None:
        """Load 32 bits from memory."""
        text = f"{target} = *(u32 *)({base} {offset:+d})"
        self._add(_Instruction(_LOAD_WORD, text, comment, target, base, offset))

    def load_byte(self, target: Register, base: Register, offset: int, comment: str = "") -> None:
        """Load 8 bits from memory."""
        text = f"{target} = *(u8 *)({base} {offset:+d})"
        self._add(_Instruction(_LOAD_BYTE, text, comment, target, base, offset))

    def load_double(self, target: Register, base: Register, offset: int, comment: str = "") -> None:
        """Load 64 bits from memory."""
        text = f"{target} = *(u64 *)({base} {offset:+d})"
        self._add(_Instruction(_LOAD_DOUBLE, text, comment, target, base, offset))

    def store_word(self, base: Register, offset: int, value: int, comment: str = "") -> None:
        """Store a constant of 32 bits."""
        text = f"*(u32 *)({base} {offset:+d}) = {value}"
        self._add(_Instruction(_STORE_WORD, text, comment, base, 0, offset, _signed(value)))

    def add_in_memory(self, base: Register, offset: int, source: Register, comment: str = "") -> None:
        """Add a register to 64 bits in memory, atomically."""
        text = f"lock *(u64 *)({base} {offset:+d}) += {source}"
        self._add(_Instruction(_ADD_IN_MEMORY, text, comment, base, source, offset))

    def move(self, target: Register, value: int, comment: str = "") -> None:
        """Set a register to a constant of 32 bits."""
        self._add(_Instruction(_MOVE, f"{target} = {value}", comment, target, constant=_signed(value)))

    def copy(self, target: Register, source: Register, comment: str = "") -> None:
        """Set a register to another's value."""
        self._add(_Instruction(_MOVE_FROM, f"{target} = {source}", comment, target, source))

    def add(self, target: Register, value: int, comment: str = "") -> None:
        """Add a constant to a register."""
        self._add(_Instruction(_ADD, f"{target} += {value}", comment, target, constant=value))

    def from_network(self, target: Register, bits: int, comment: str = "") -> None:
        """Convert a register from the network's byte order."""
        self._add(_Instruction(_FROM_NETWORK, f"{target} = be{bits} {target}", comment, target, constant=bits))

    def jump(self, left: Register, relation: str, value: int, label: str, comment: str = "") -> None:
        """Go to a label if a register compares so with a constant: ==, !=, > or <, unsigned."""
        text = f"if {left} {relation} {value} goto {label}"
        code = _JUMPS[relation]
        self._add(_Instruction(code, text, comment, left, constant=_signed(value), label=label))

    def jump_above(self, left: Register, right: Register, label: str, comment: str = "") -> None:
        """Go to a label if a register is greater than another, unsigned."""
        text = f"if {left} > {right} goto {label}"
        self._add(_Instruction(_JUMP_ABOVE, text, comment, left, right, label=label))

    def go(self, label: str, comment: str = "") -> None:
        """Go to a label."""
        self._add(_Instruction(_GO, f"goto {label}", comment, label=label))

    def call(self, helper: int, name: str, comment: str = "") -> None:
        """Call one of the kernel's helpers (bpf-helpers(7))."""
        self._add(_Instruction(_CALL, f"call {name}", comment, constant=helper))

    def load_value(self, target: Register, descriptor: int, offset: int, name: str, comment: str = "") -> None:
        """Load the address of a place in the only value of a map."""
        text = f"{target} = address of {name}"
        self._add(
            _Instruction(_LOAD_CONSTANT, text, comment, target, _PSEUDO_VALUE, constant=descriptor, second=offset)
        )

    def exit(self, comment: str = "") -> None:
        """Return R0."""
        self._add(_Instruction(_EXIT, "exit", comment))

    # -- results

    def assemble(self) -> bytes:
        """The bytes for bpf(2)."""
        place = 0
        parts = []
        for instruction in self._instructions:
            place += instruction.slots
            if instruction.label:
                instruction.offset = self._labels[instruction.label] - place
            parts.append(instruction.encode())
        return b"".join(parts)

    def listing(self) -> list[str]:
        """The program as text: labels, and instructions with their places and comments."""
        names: dict[int, list[str]] = {}
        for label, place in self._labels.items():
            names.setdefault(place, []).append(label)
        lines, place = [], 0
        for instruction in self._instructions:
            lines += [f"{label}:" for label in names.get(place, ())]
            comment = f"; {instruction.comment}" if instruction.comment else ""
            lines.append(f"{place:5}  {instruction.text:<42}{comment}".rstrip())
            place += instruction.slots
        return lines

    def _add(self, instruction: _Instruction) -> None:
        self._instructions.append(instruction)
        self._slots += instruction.slots


def _signed(value: int) -> int:
    """A constant of 32 bits, as the signed field holds it."""
    return value - (1 << 32) if value >= 1 << 31 else value
