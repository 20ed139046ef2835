"""The kernel's bpf(2) through the distribution's libbpf.so.1: maps and pins. Programs are in programs.py.

A thin typed layer over ctypes, so that the long-lived agent needs neither BCC nor LLVM. Everything speaks bytes and
file descriptors; what the bytes mean is up to abi.py and the map modules. Failures raise OSError with the kernel's
errno, which the callers translate.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import resource
import sys
from array import array
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BPF_ANY = 0
BPF_NOEXIST = 1
BPF_F_NO_PREALLOC = 1
BPF_F_MMAPABLE = 1024

MAP_TYPE_HASH = 1
MAP_TYPE_ARRAY = 2
MAP_TYPE_PROG_ARRAY = 3
MAP_TYPE_PERCPU_ARRAY = 6
MAP_TYPE_LRU_HASH = 9
MAP_TYPE_LPM_TRIE = 11
MAP_TYPE_ARRAY_OF_MAPS = 12
MAP_TYPE_QUEUE = 22

ENOTSUPP = 524
"""The kernel's errno for an operation that a map type lacks; user space has no name for it."""

_BATCH = 4096


class _MapInfo(ctypes.Structure):
    """The head of ``struct bpf_map_info``; the kernel fills in as much as we ask for."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


class _MapCreateOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Return libbpf with the prototypes it needs; DatapathError when it is not installed."""
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as exc:
        raise DatapathError("libbpf.so.1 is missing: install the package libbpf1") from exc
    number, pointer = ctypes.c_int, ctypes.c_void_p
    lib.bpf_map_update_elem.argtypes = (number, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64)
    lib.bpf_map_lookup_elem.argtypes = (number, ctypes.c_char_p, pointer)
    lib.bpf_map_delete_elem.argtypes = (number, ctypes.c_char_p)
    lib.bpf_map_get_next_key.argtypes = (number, ctypes.c_char_p, pointer)
    lib.bpf_map_update_batch.argtypes = (number, ctypes.c_char_p, ctypes.c_char_p, pointer, pointer)
    lib.bpf_map_delete_batch.argtypes = (number, ctypes.c_char_p, pointer, pointer)
    lib.bpf_map_lookup_batch.argtypes = (number, pointer, pointer, pointer, pointer, pointer, pointer)
    lib.bpf_map_lookup_and_delete_elem.argtypes = (number, ctypes.c_char_p, pointer)
    lib.bpf_map_create.argtypes = (number, ctypes.c_char_p, *(ctypes.c_uint32,) * 3, pointer)
    lib.bpf_prog_load.argtypes = (number, *(ctypes.c_char_p,) * 3, ctypes.c_size_t, pointer)
    lib.bpf_obj_get.argtypes = (ctypes.c_char_p,)
    lib.bpf_obj_pin.argtypes = (number, ctypes.c_char_p)
    lib.bpf_obj_get_info_by_fd.argtypes = (number, pointer, pointer)
    lib.perf_buffer__new_raw.argtypes = (number, ctypes.c_size_t, *(pointer,) * 4)
    lib.perf_buffer__new_raw.restype = pointer
    for name in ("perf_buffer__epoll_fd", "perf_buffer__buffer_cnt", "perf_buffer__free"):
        getattr(lib, name).argtypes = (pointer,)
    lib.perf_buffer__buffer.argtypes = (pointer, number, pointer, pointer)
    lib.bpf_link_create.argtypes = (number, number, number, pointer)
    lib.bpf_link_update.argtypes = (number, number, pointer)
    lib.bpf_prog_query.argtypes = (number, number, ctypes.c_uint32, pointer, pointer, pointer)
    lib.libbpf_set_print(None)  # its messages on stderr would duplicate our errors
    return lib


@functools.cache
def _quick_library() -> ctypes.PyDLL:
    """Return libbpf for calls of a microsecond: releasing the interpreter would take as long as the call."""
    library()  # reports what is missing
    lib = ctypes.PyDLL("libbpf.so.1")
    number = ctypes.c_int
    lib.bpf_map_update_elem.argtypes = (number, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64)
    lib.bpf_map_lookup_elem.argtypes = (number, ctypes.c_char_p, ctypes.c_void_p)
    lib.bpf_map_delete_elem.argtypes = (number, ctypes.c_char_p)
    return lib


def checked(result: int) -> int:
    """Return libbpf's result; OSError if it is an error."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def possible_cpus() -> int:
    """Return how many copies a per-CPU map element has."""
    return checked(library().libbpf_num_possible_cpus())


@dataclass(frozen=True, slots=True)
class MapLayout:
    """What makes two maps interchangeable for the programs that use them."""

    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int

    def __str__(self) -> str:
        """Return it the way bpftool writes it."""
        return (
            f"type {self.kind}, key {self.key_size}B, value {self.value_size}B, "
            f"max_entries {self.max_entries}, flags {self.flags:#x}"
        )


def raise_memlock() -> None:
    """Lift RLIMIT_MEMLOCK, to which kernels before 5.11 charge maps."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):  # no CAP_SYS_RESOURCE: only old kernels need it, and they will report it
        return


def pin(fd: int, path: Path) -> None:
    """Pin a map, program or link, replacing an older pin of that name."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    checked(library().bpf_obj_pin(fd, os.fsencode(path)))


def open_pin(path: Path) -> int:
    """Return a file descriptor of a pinned map, program or link."""
    return checked(library().bpf_obj_get(os.fsencode(path)))


def get_info(fd: int, info: ctypes.Structure) -> None:
    """Fill in the kernel's description of a map, program or link."""
    size = ctypes.c_uint32(ctypes.sizeof(info))
    checked(library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)))


class Map:
    """One open BPF map: elements as bytes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lib = library()
        info = _MapInfo()
        get_info(fd, info)
        self.map_id = info.id
        self.layout = MapLayout(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)
        copies = possible_cpus() if info.type == MAP_TYPE_PERCPU_ARRAY else 1
        # Per-CPU copies are rounded up to 8 bytes each (bpf(2)); our values are multiples of that already.
        self._value_size = info.value_size * copies
        # A change in a map of maps waits until no program runs any more that may have seen the map before: 10 ms, and
        # several 100 on a busy machine, during which other threads must run.
        lib = self._lib if info.type == MAP_TYPE_ARRAY_OF_MAPS else _quick_library()
        self._lookup, self._update = lib.bpf_map_lookup_elem, lib.bpf_map_update_elem
        self._delete = lib.bpf_map_delete_elem
        # One buffer for all lookups: nothing else runs between the call and the copy.
        self._value = ctypes.create_string_buffer(max(self._value_size, 1))

    @classmethod
    def pinned(cls, path: Path) -> Map:
        """Open a pinned map; OSError (EINVAL) if it is a program or a link."""
        fd = open_pin(path)
        # The kernel describes those by other structs, whose bytes would pass for sizes.
        if str(Path(f"/proc/self/fd/{fd}").readlink()) != "anon_inode:bpf-map":
            os.close(fd)
            raise OSError(errno.EINVAL, "not a map")
        return cls(fd)

    @classmethod
    def by_id(cls, map_id: int) -> Map:
        """Open a map by its id; FileNotFoundError when it is gone."""
        return cls(checked(library().bpf_map_get_fd_by_id(map_id)))

    @classmethod
    def create(cls, name: str, layout: MapLayout, like: int = 0) -> Map:
        """Create a map, which lives until its last file descriptor is closed; like: for a map of maps, the template."""
        opts = _MapCreateOpts(sz=ctypes.sizeof(_MapCreateOpts), map_flags=layout.flags, inner_map_fd=like)
        sizes = (layout.key_size, layout.value_size, layout.max_entries)
        return cls(checked(library().bpf_map_create(layout.kind, name.encode(), *sizes, ctypes.byref(opts))))

    def close(self) -> None:
        """Close the file descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def lookup(self, key: bytes) -> bytes | None:
        """Return the element's bytes (per-CPU maps: all copies in a row), None if there is none."""
        result = self._lookup(self.fd, key, self._value)
        if result == -errno.ENOENT:
            return None
        if result:
            checked(result)
        return self._value.raw

    def update(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
        """Write one element; OSError with EEXIST, ENOENT, ENOSPC or E2BIG as in bpf(2)."""
        if result := self._update(self.fd, key, value, flags):
            checked(result)

    def insert_many(self, items: Iterable[tuple[bytes, bytes]]) -> list[bool]:
        """Add elements with one call each; return which were added, rather than there already or refused."""
        # ctypes need not convert these each time: that is an eighth of the call.
        insert, fd, flags = self._update, ctypes.c_int(self.fd), ctypes.c_uint64(BPF_NOEXIST)
        inserted: list[bool] = []
        for key, value in items:
            inserted.append(insert(fd, key, value, flags) == 0)
        return inserted

    def delete(self, key: bytes) -> bool:
        """Remove one element; False if there was none."""
        result = self._delete(self.fd, key)
        if result == -errno.ENOENT:
            return False
        checked(result)
        return True

    def program_ids(self) -> list[int]:
        """Return the ids of the programs in a program array."""
        slots = (index.to_bytes(4, sys.byteorder) for index in range(self.layout.max_entries))
        return [int.from_bytes(raw, sys.byteorder) for raw in map(self.lookup, slots) if raw is not None]

    def push(self, value: bytes) -> None:
        """Add to a queue map."""
        checked(self._lib.bpf_map_update_elem(self.fd, None, value, BPF_ANY))

    def drain(self) -> int:
        """Empty a queue map; return how many elements it held."""
        value = ctypes.create_string_buffer(self._value_size)
        count = 0
        while self._lib.bpf_map_lookup_and_delete_elem(self.fd, None, value) == 0:
            count += 1
        return count

    def update_many(self, items: list[tuple[bytes, bytes]]) -> None:
        """Write many elements in as few system calls as the kernel allows."""
        if len(items) == 1:
            self.update(*items[0])
            return
        for start in range(0, len(items), _BATCH):
            part = items[start : start + _BATCH]
            count = ctypes.c_uint32(len(part))
            keys, values = map(b"".join, zip(*part, strict=True))
            result = self._lib.bpf_map_update_batch(self.fd, keys, values, ctypes.byref(count), None)
            if result in (-errno.EINVAL, -ENOTSUPP):  # LPM tries have had batches since 5.13
                for key, value in part:
                    self.update(key, value)
            else:
                checked(result)

    def zero(self) -> None:
        """Set every element of an array to zero, in one system call."""
        size, count = self.layout.max_entries, ctypes.c_uint32(self.layout.max_entries)
        keys, values = array("I", range(size)).tobytes(), bytes(size * self.layout.value_size)
        checked(self._lib.bpf_map_update_batch(self.fd, keys, values, ctypes.byref(count), None))

    def delete_many(self, keys: list[bytes]) -> None:
        """Remove many elements; some may be gone already."""
        for key in keys:
            self.delete(key)

    def is_empty(self) -> bool:
        """Return whether there is no element; a hash table is searched until one is found."""
        key = ctypes.create_string_buffer(self.layout.key_size)
        result = self._lib.bpf_map_get_next_key(self.fd, None, key)
        if result not in (0, -errno.ENOENT):
            checked(result)
        return bool(result)

    def count(self) -> int | None:
        """Count the elements. The interpreter is released while the kernel reads, so a thread may do this.

        If the element at which the kernel has arrived in an LPM trie is deleted, it starts over and the count is too
        high: None if it exceeds the map's size.
        """
        try:
            return self._sum(count for _, _, count in self._batches())
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, ENOTSUPP):
                raise
            return self._sum(1 for _ in self._items_one_by_one())

    def _sum(self, counts: Iterable[int]) -> int | None:
        most = self.layout.max_entries
        for total in accumulate(counts, initial=0):
            if total > most:
                return None
        return total

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield every element, in batches; one that changes meanwhile may appear once, twice or not at all."""
        try:
            yield from self._items_batched()
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, ENOTSUPP):
                raise
            yield from self._items_one_by_one()

    def _items_batched(self) -> Iterator[tuple[bytes, bytes]]:
        key_size, value_size = self.layout.key_size, self.layout.value_size
        for keys, values, count in self._batches():
            for i in range(count):
                yield keys[i * key_size : (i + 1) * key_size], values[i * value_size : (i + 1) * value_size]

    def _batches(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield some thousand elements at a time: all keys, all values, how many."""
        key_size, value_size, room = self.layout.key_size, self.layout.value_size, _BATCH
        # The continuation token of an LPM trie is a whole key, a hash table's is 4 bytes.
        token = ctypes.create_string_buffer(max(key_size, 4))
        first, done = True, False
        while not done:
            keys = ctypes.create_string_buffer(room * key_size)
            values = ctypes.create_string_buffer(room * value_size)
            count = ctypes.c_uint32(room)
            start = None if first else token
            result = self._lib.bpf_map_lookup_batch(
                self.fd, start, token, keys, values, ctypes.byref(count), None
            )
            if result == -errno.ENOSPC:  # a hash bucket holds more than fits
                room *= 2
                continue
            # EINTR: elements were deleted while the kernel read them (until 6.13); the batch ends early, and must be
            # requested again if it is empty.
            interrupted, done = result == -errno.EINTR, result == -errno.ENOENT
            if interrupted and not count.value:
                continue
            if not done and not interrupted:
                checked(result)
            first = False
            yield keys.raw, values.raw, count.value

    def _items_one_by_one(self) -> Iterator[tuple[bytes, bytes]]:
        key = ctypes.create_string_buffer(self.layout.key_size)
        result = self._lib.bpf_map_get_next_key(self.fd, None, key)
        while result == 0:
            here = key.raw
            value = self.lookup(here)
            if value is not None:
                yield here, value
            result = self._lib.bpf_map_get_next_key(self.fd, here, key)
        if result != -errno.ENOENT:
            checked(result)
