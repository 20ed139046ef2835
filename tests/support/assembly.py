"""TC programs put together by hand, so that they need neither clang nor BCC."""

from __future__ import annotations

import struct

from lazymesh.datapath.programs import PROG_TYPE_SCHED_CLS, load_program


def op(code: int, target: int = 0, source: int = 0, offset: int = 0, *, immediate: int = 0) -> bytes:
    """Return one instruction."""
    return struct.pack("=BBhi", code, source << 4 | target, offset, immediate)


def map_in(register: int, descriptor: int) -> bytes:
    """Return what puts a map into a register."""
    return op(0x18, register, 1, immediate=descriptor) + op(0)


def lookup(descriptor: int, stack: int) -> bytes:
    """Return what looks up the key on the stack: r0 is the value, or 0."""
    key = op(0xBF, 2, 10) + op(0x07, 2, immediate=stack)
    return key + map_in(1, descriptor) + op(0x85, immediate=1)


def leave(verdict: int) -> bytes:
    """Return what ends the program."""
    return op(0xB7, 0, immediate=verdict) + op(0x95)


def count(code: bytes) -> int:
    """Return the number of instructions, for jumps."""
    return len(code) // 8


def load(code: bytes) -> int:
    """Load a program; return its file descriptor."""
    return load_program("lm_test", PROG_TYPE_SCHED_CLS, "GPL", code)
