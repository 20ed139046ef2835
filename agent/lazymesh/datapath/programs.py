"""Programs and tcx links through libbpf: load, run over a packet, attach, describe."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

from lazymesh.datapath.libbpf import checked, get_info, library

_TCX_INGRESS = 46
_BPF_F_BEFORE = 1 << 3
"""With no program named, it means the head of the chain."""
_INSTRUCTION_SIZE = 8
PROG_TYPE_SOCKET_FILTER, PROG_TYPE_SCHED_CLS = 1, 3
_CHAIN_MOST = 64
"""BPF_MPROG_MAX: the longest chain."""


class _LinkCreateOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_void_p),
        ("iter_info_len", ctypes.c_uint32),
        ("target_btf_id", ctypes.c_uint32),
        ("union", ctypes.c_uint64 * 4),
    )


class _LoadOpts(ctypes.Structure):
    """``struct bpf_prog_load_opts`` of libbpf 1."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_void_p),
    )


_LOG_SIZE = (16 << 20) - 1
"""UINT_MAX >> 8: the most that every kernel accepts."""


class _LinkInfo(ctypes.Structure):
    """The head of ``struct bpf_link_info``, with the member of tcx links."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
    )


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


_MAPS_MOST = 64
"""MAX_USED_MAPS: the most that a program refers to."""


@dataclass(frozen=True, slots=True)
class ProgramDescription:
    """The kernel's description of a program; its name is cut at 15 characters."""

    name: str
    map_ids: tuple[int, ...]


def attach_tcx(program: int, ifindex: int) -> int:
    """Attach a program at the head of an interface's tcx ingress; return the link's file descriptor."""
    opts = _LinkCreateOpts(sz=ctypes.sizeof(_LinkCreateOpts), flags=_BPF_F_BEFORE)
    return checked(library().bpf_link_create(program, ifindex, _TCX_INGRESS, ctypes.byref(opts)))


def update_link(link: int, program: int) -> None:
    """Replace a link's program."""
    checked(library().bpf_link_update(link, program, None))


def detach_link(link: int) -> None:
    """Detach a link's program at once; nothing to do if the interface is gone."""
    result = library().bpf_link_detach(link)
    if result not in (0, -errno.ENOLINK):
        checked(result)


def link_ifindex(link: int) -> int:
    """Return the index of the interface that a tcx link is on; 0 if that is gone."""
    info = _LinkInfo()
    get_info(link, info)
    return int(info.ifindex)


def tcx_programs(ifindex: int) -> list[int]:
    """Return the ids of the programs on an interface's tcx ingress, in the order in which they run."""
    ids, count = (ctypes.c_uint32 * _CHAIN_MOST)(), ctypes.c_uint32(_CHAIN_MOST)
    flags = ctypes.c_uint32()
    words = (ctypes.byref(flags), ids, ctypes.byref(count))
    checked(library().bpf_prog_query(ifindex, _TCX_INGRESS, 0, *words))
    return list(ids[: count.value])


def program_id(program: int) -> int:
    """Return a program's id."""
    info = _ProgramInfo()
    get_info(program, info)
    return int(info.id)


def load_program(name: str, kind: int, license_words: str, code: bytes) -> int:
    """Load instructions as a program; return its file descriptor. OSError: its text has the verifier's complaint."""
    words = (kind, name.encode(), license_words.encode(), code, len(code) // _INSTRUCTION_SIZE)
    found = library().bpf_prog_load(*words, None)
    if found >= 0:
        return int(found)
    log = ctypes.create_string_buffer(_LOG_SIZE)
    options = _LoadOpts(
        sz=ctypes.sizeof(_LoadOpts), log_level=1, log_size=_LOG_SIZE, log_buf=ctypes.addressof(log)
    )
    found = library().bpf_prog_load(*words, ctypes.byref(options))
    if found >= 0:
        return int(found)
    complaint = complaint_of(log.value.decode(errors="replace"))
    raise OSError(-found, os.strerror(-found) + (f" ({complaint})" if complaint else ""))


def complaint_of(log: str) -> str:
    """Return the line of the verifier's log that says what is wrong: the last one before its statistics."""
    lines = [line.strip() for line in log.splitlines()]
    statistics = ("processed ", "verification time", "stack depth")
    return next((line[:200] for line in reversed(lines) if line and not line.startswith(statistics)), "")


def load_idle() -> int:
    """Load a TC program that leaves every packet to the next; return its file descriptor."""
    # r0 = -1 (TC_ACT_UNSPEC); exit
    code = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    return load_program("lm_idle", PROG_TYPE_SCHED_CLS, "Dual BSD/GPL", code)


class TestRunOpts(ctypes.Structure):
    """``struct bpf_test_run_opts`` of libbpf 1."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_char_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


def run_program(fd: int, data: bytes) -> tuple[int, bytes]:
    """Run a TC program over a packet of at most some 3,600 bytes; return its verdict and the packet afterwards."""
    room = ctypes.create_string_buffer(len(data))
    options = TestRunOpts(
        sz=ctypes.sizeof(TestRunOpts),
        data_in=data,
        data_size_in=len(data),
        data_out=ctypes.addressof(room),
        data_size_out=len(data),
        repeat=1,
    )
    checked(library().bpf_prog_test_run_opts(fd, ctypes.byref(options)))
    return options.retval, room.raw


def describe_program(number: int) -> ProgramDescription:
    """Describe any program by its id; FileNotFoundError when it is gone."""
    fd = checked(library().bpf_prog_get_fd_by_id(number))
    try:
        ids = (ctypes.c_uint32 * _MAPS_MOST)()
        info = _ProgramInfo(nr_map_ids=_MAPS_MOST, map_ids=ctypes.addressof(ids))
        get_info(fd, info)
        return ProgramDescription(info.name.decode(errors="replace"), tuple(ids[: info.nr_map_ids]))
    finally:
        os.close(fd)
