"""BPF programs of the tests' own: compiled by clang, loaded by libbpf, and asked the kernel about.

For the stand-in of cilium-agent and other programs that are not ours: lazymesh's own go the agent's way.
Map sizes, names and flags are the caller's business; an object only says where its programs use them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lazymesh.datapath.libbpf import library

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CLANG = "clang-14"


def compile_bpf(source: Path, target: Path, **defines: int) -> Path:
    """Compile one C file for the kernel; RuntimeError with clang's words when it does not."""
    words = [
        CLANG,
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-target",
        "bpf",
        f"-I/usr/include/{_multiarch()}",
    ]
    words += [f"-D{name}={value}" for name, value in defines.items()]
    done = subprocess.run(
        [*words, "-c", str(source), "-o", str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stderr}")
    return target


def _multiarch() -> str:
    # <asm/types.h> is where Debian puts what differs by machine.
    return f"{os.uname().machine}-linux-gnu"


class BpfObject:
    """A loaded object file: chosen programs, over maps that exist already.

    maps: the object's name of a map to the descriptor of the one to use; maps of programs that are not chosen
    and not named here are not made at all.
    constants: a read-only section (``.rodata.config``) to its bytes.
    """

    def __init__(
        self,
        path: Path,
        programs: Sequence[str],
        maps: Mapping[str, int],
        constants: Mapping[str, bytes] | None = None,
    ) -> None:
        self._lib = _library()
        self._programs = tuple(programs)
        self._object = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise OSError(ctypes.get_errno(), f"cannot open {path}")
        try:
            self._choose(programs)
            self._use(maps, constants or {})
            _checked(self._lib.bpf_object__load(self._object), f"cannot load {path.name}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all descriptors back; what is attached, pinned or in a program array stays."""
        if self._object:
            self._lib.bpf_object__close(self._object)
            self._object = None

    def program(self, name: str) -> int:
        """Return the descriptor of one of the chosen programs; it goes with this object."""
        return _checked(self._lib.bpf_program__fd(self._find_program(name)), name)

    def _choose(self, programs: Sequence[str]) -> None:
        one = self._lib.bpf_object__next_program(self._object, None)
        while one:
            wanted = self._lib.bpf_program__name(one).decode() in programs
            _checked(self._lib.bpf_program__set_autoload(one, wanted), "autoload")
            one = self._lib.bpf_object__next_program(self._object, one)

    def _use(self, maps: Mapping[str, int], constants: Mapping[str, bytes]) -> None:
        one = self._lib.bpf_object__next_map(self._object, None)
        while one:
            if self._lib.bpf_map__name(one).decode() not in {*maps, *constants}:
                _checked(self._lib.bpf_map__set_autocreate(one, False), "autocreate")
            one = self._lib.bpf_object__next_map(self._object, one)
        # From here on a map has the name of the one that it is, cut by the kernel.
        for name, fd in maps.items():
            _checked(self._lib.bpf_map__reuse_fd(self._find_map(name), fd), f"cannot use a map as {name}")
        for name, value in constants.items():
            _checked(self._lib.bpf_map__set_initial_value(self._find_map(name), value, len(value)), name)

    def _find_map(self, name: str) -> int:
        found: int | None = self._lib.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise KeyError(f"no map {name} in this object")
        return found

    def _find_program(self, name: str) -> int:
        found: int | None = self._lib.bpf_object__find_program_by_name(self._object, name.encode())
        if not found or name not in self._programs:
            raise KeyError(f"no program {name} loaded from this object")
        return found


class _ProgramInfo(ctypes.Structure):
    """The head of ``struct bpf_prog_info``."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64),
        ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


@dataclass(frozen=True)
class ProgramInfo:
    """What the kernel says of a program: its id, its name cut at 15 characters, the maps that it refers to."""

    program_id: int
    name: str
    map_ids: tuple[int, ...]


def program_info(fd: int) -> ProgramInfo:
    """Ask the kernel about the program behind a descriptor."""
    room = 64
    ids = (ctypes.c_uint32 * room)()
    info = _ProgramInfo(nr_map_ids=room, map_ids=ctypes.addressof(ids))
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _checked(_library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)), "program info")
    return ProgramInfo(info.id, info.name.decode(), tuple(ids[: info.nr_map_ids]))


def program_info_by_id(program_id: int) -> ProgramInfo:
    """Ask the kernel about a program by its id; OSError ENOENT when it is gone."""
    fd = _checked(_library().bpf_prog_get_fd_by_id(program_id), f"no program {program_id}")
    try:
        return program_info(fd)
    finally:
        os.close(fd)


def open_map_id(map_id: int) -> int:
    """Return a descriptor of a map by its id; OSError ENOENT when it is gone."""
    return _checked(_library().bpf_map_get_fd_by_id(map_id), f"no map {map_id}")


def map_exists(map_id: int) -> bool:
    """Tell whether the kernel still has a map: whether any program, pin or descriptor holds it."""
    try:
        os.close(open_map_id(map_id))
    except FileNotFoundError:
        return False
    return True


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def _library() -> ctypes.CDLL:
    """Return libbpf with the prototypes of the calls that take or return pointers."""
    lib = library()
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    lib.bpf_object__open_file.argtypes, lib.bpf_object__open_file.restype = (text, pointer), pointer
    for name in ("bpf_object__find_map_by_name", "bpf_object__find_program_by_name"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = (pointer, text), pointer
    for name in ("bpf_object__next_program", "bpf_object__next_map"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = (pointer, pointer), pointer
    for name in ("bpf_program__name", "bpf_map__name"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = (pointer,), text
    for name in ("bpf_object__load", "bpf_object__close", "bpf_program__fd"):
        getattr(lib, name).argtypes = (pointer,)
    lib.bpf_program__set_autoload.argtypes = (pointer, ctypes.c_bool)
    lib.bpf_map__set_autocreate.argtypes = (pointer, ctypes.c_bool)
    lib.bpf_map__reuse_fd.argtypes = (pointer, number)
    lib.bpf_map__set_initial_value.argtypes = (pointer, text, ctypes.c_size_t)
    return lib
