"""Programs as BCC compiled them: loaded, and cached in a file, so that the next start saves the compiler's second.

The cache is valid only for its inputs: our C and the code that turns it into this file, BCC, LLVM, kernel and number of
processors. Whatever is wrong with the file or its content, BCC compiles again. Instructions refer to a map by file
descriptor: that of the pinned map, or of a new one, is put there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import struct
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lazymesh.datapath import libbpf
from lazymesh.datapath.ipcachemaps import IpcacheLayout, make_outer_map
from lazymesh.datapath.libbpf import MapLayout  # noqa: TC001 (msgspec reads it)
from lazymesh.datapath.maps import make_map, open_or_make_map
from lazymesh.datapath.pins import IPCACHE, RINGS, VIEWS, expected_layouts
from lazymesh.datapath.programs import load_program
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lazymesh.datapath.libbpf import Map
    from lazymesh.datapath.pins import Pins

_INSTRUCTION = struct.Struct("=BBhi")
_LOAD_64, _MAP_FD = 0x18, 1
"""``BPF_LD | BPF_IMM | BPF_DW`` and ``BPF_PSEUDO_MAP_FD``: what follows is a map's file descriptor."""


class Program(msgspec.Struct, frozen=True):
    """One program: its type as the kernel numbers it, its instructions, and which of them (by index) name which map."""

    kind: int
    license: str
    code: bytes
    maps: dict[int, str]


class Compiled(msgspec.Struct, frozen=True):
    """All programs, and what they were compiled from."""

    origin: str
    compiler: dict[str, tuple[int, int]] | None
    """Size and modification time (ns) of the compiler's files; None if they changed while they were used."""
    programs: dict[str, Program]
    fresh: dict[str, MapLayout]
    """The other maps, by name: they belong to one load of the programs, and new ones are made each time."""


class _File(msgspec.Struct, frozen=True):
    digest: str
    """SHA-256 of the rest: the verifier would accept many instructions that the compiler never wrote."""
    compiled: msgspec.Raw


def program_of(kind: int, license_words: str, code: bytes, names: Mapping[int, str]) -> Program:
    """Describe instructions that refer to maps by file descriptor; KeyError for a map without a name."""
    maps, instructions = {}, list(_INSTRUCTION.iter_unpack(code))
    at = 0
    while at < len(instructions):
        opcode, registers, _, immediate = instructions[at]
        if opcode == _LOAD_64 and registers >> 4 == _MAP_FD:
            maps[at] = names[immediate]
        at += 2 if opcode == _LOAD_64 else 1
    return Program(kind, license_words, code, maps)


def files(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return size and modification time of files; OSError if one is missing."""
    found = {path: Path(path).stat() for path in paths}
    return {path: (each.st_size, each.st_mtime_ns) for path, each in found.items()}


def encode(compiled: Compiled) -> bytes:
    """Encode programs as a file's content."""
    body = msgspec.json.encode(compiled)
    return msgspec.json.encode(_File(hashlib.sha256(body).hexdigest(), msgspec.Raw(body)))


def decode(content: bytes) -> Compiled:
    """Decode a file's content; ValueError or RecursionError if it is damaged."""
    file = msgspec.json.decode(content, type=_File)
    if hashlib.sha256(file.compiled).hexdigest() != file.digest:
        raise ValueError("the digest does not match")
    return msgspec.json.decode(file.compiled, type=Compiled)


def write(path: Path, compiled: Compiled, made_of: str) -> None:
    """Write programs to a file, atomically; OSError, also for a device or pipe, which must not be replaced.

    made_of: the origin that they should have.
    """
    if compiled.origin != made_of or compiled.compiler is None:
        raise OSError(errno.EAGAIN, "lazymesh or its compiler was replaced meanwhile")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    with contextlib.suppress(FileExistsError):  # if it is not a directory, mkstemp reports it
        path.parent.mkdir(mode=0o755, parents=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(encode(compiled))
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path, origin: str) -> Compiled | None:
    """Return the cache if it has this origin; None if it is missing, stale, damaged or writable by others."""
    try:
        # Opening a pipe would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not _is_ours_alone(os.fstat(file.fileno())):
                return None
            found = decode(file.read())
        fits = found.origin == origin and found.compiler == files(found.compiler or ())
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    return found if fits else None


def _is_ours_alone(found: os.stat_result) -> bool:
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & others


def load(compiled: Compiled, pins: Pins, ipcache_size: int) -> None:
    """Load the programs and pin everything; if anything fails, only lasting maps are pinned."""
    libbpf.raise_memlock()
    with contextlib.ExitStack() as stack:
        maps = {}

        def add(name: str, opened: Map) -> None:
            maps[name] = opened
            stack.callback(opened.close)

        for name, layout in expected_layouts(ipcache_size).items():
            if name != IPCACHE:
                add(name, open_or_make_map(pins.path(name), layout))
        for view, name in zip(IpcacheLayout, VIEWS, strict=True):
            add(name, make_outer_map(view, name))
        for name, layout in compiled.fresh.items():
            add(name, make_map(name, layout))
        programs = {}
        for name, program in compiled.programs.items():
            programs[name] = _load(name, program, maps)
            stack.callback(os.close, programs[name])
        try:
            for name in (*VIEWS, *RINGS):
                libbpf.pin(maps[name].fd, pins.path(name))
            for name, fd in programs.items():
                libbpf.pin(fd, pins.path(name))
        except OSError as exc:
            raise DatapathError(f"cannot pin {name}: {exc.strerror}") from exc


def _load(name: str, program: Program, maps: Mapping[str, Map]) -> int:
    code = bytearray(program.code)
    try:
        for at, wanted in program.maps.items():
            offset = at * _INSTRUCTION.size + 4
            code[offset : offset + 4] = maps[wanted].fd.to_bytes(4, sys.byteorder)
        return load_program(name, program.kind, program.license, bytes(code))
    except KeyError as exc:
        raise DatapathError(f"{name} refers to an unknown map: {exc}") from exc
    except OSError as exc:
        raise DatapathError(f"the kernel refuses {name}: {exc.strerror}") from exc
