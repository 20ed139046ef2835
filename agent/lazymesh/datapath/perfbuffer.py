"""The perf rings of a BPF program's events, read in bulk.

libbpf creates the rings; they are read here, in mapped memory, because its callbacks into Python take longer than the
rest of a signal's way through user space.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

from lazymesh.datapath.libbpf import checked, library

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.datapath.libbpf import Map


class _PerfEventAttr(ctypes.Structure):
    """The head of ``struct perf_event_attr``, in its first version (PERF_ATTR_SIZE_VER0)."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("bits", ctypes.c_uint64),
        ("wakeup_events", ctypes.c_uint32),
        ("bp_type", ctypes.c_uint32),
        ("config1", ctypes.c_uint64),
    )


class PerfBuffer:
    """A reader of a perf event array: one ring per CPU behind one pollable file descriptor.

    wakes: each record makes the file descriptor readable. Otherwise a ring does so once it is half full, and a record
    costs the packet that it is about a tenth.
    """

    def __init__(
        self, events: Map, pages: int, on_samples: Callable[[list[bytes]], None], *, wakes: bool = False
    ) -> None:
        self._lib = library()
        self._on_samples = on_samples
        self.lost = 0
        """Records that the kernel could not put into a ring, by its count."""
        attr = _PerfEventAttr(
            type=_SOFTWARE,
            size=ctypes.sizeof(_PerfEventAttr),
            config=_BPF_OUTPUT,
            sample_period=1,
            sample_type=_RAW,
            wakeup_events=int(wakes),
        )
        # libbpf would call back only when it is asked to read.
        self._buffer = self._lib.perf_buffer__new_raw(events.fd, pages, ctypes.byref(attr), None, None, None)
        if not self._buffer:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.fd = checked(self._lib.perf_buffer__epoll_fd(self._buffer))
        self._rings = [self._ring(index) for index in range(self._lib.perf_buffer__buffer_cnt(self._buffer))]

    def consume(self, limit: int = 1 << 30) -> bool:
        """Pass waiting records to on_samples, CPU by CPU: ordered by time only within one.

        At most ``limit`` in all; return whether more may be waiting. perf_buffer__poll would miss what a full edge left
        behind.
        """
        more = False
        for ring in self._rings:
            head = ring.head.value
            if ring.position == head:
                continue
            if not _ORDERED:
                self._fence()
            limit -= self._read(ring, head, limit)
            more |= ring.position != head
            if not _ORDERED:
                self._fence()
            ring.tail.value = ring.position
        return more

    def close(self) -> None:
        """Remove our rings from the map."""
        if self._buffer:
            self._rings = []
            self._lib.perf_buffer__free(self._buffer)
            self._buffer = None

    def _ring(self, index: int) -> _Ring:
        base, size = ctypes.c_void_p(), ctypes.c_size_t()
        checked(self._lib.perf_buffer__buffer(self._buffer, index, ctypes.byref(base), ctypes.byref(size)))
        return _Ring(base.value or 0, size.value)

    def _fence(self) -> None:
        # The call releases the interpreter and takes it again: those are locks, and so barriers between the reads
        # before and after it, as the rings' protocol demands (perf_event_open(2)).
        self._lib.perf_buffer__buffer_cnt(self._buffer)

    def _read(self, ring: _Ring, head: int, limit: int) -> int:
        """Read up to a position or a number of records; return how many were read."""
        read = 0
        while ring.position != head and read < limit:
            data, at = ring.ahead(head), 0
            samples: list[bytes] = []
            while at + _RECORD.size <= len(data) and read + len(samples) < limit:
                kind, _, length, raw_length = _RECORD.unpack_from(data, at)
                if at + length > len(data):
                    break  # the next read begins with it
                if kind == _RECORD_SAMPLE and at + length == len(data):  # a lone one, mostly
                    samples.append(data[at + 12 : at + 12 + raw_length])
                elif kind == _RECORD_SAMPLE:
                    count = min((len(data) - at) // length, limit - read - len(samples))
                    alike = _alike(data[at : at + count * length], length)
                    samples += [sample for (sample,) in _samples(length, raw_length).iter_unpack(alike)]
                    at += len(alike)
                    continue
                elif kind == _RECORD_LOST:
                    self.lost += int.from_bytes(data[at + 16 : at + 24], sys.byteorder)
                at += length
            ring.position += at
            read += len(samples)
            self._on_samples(samples)
        return read


def _alike(data: bytes, length: int) -> bytes:
    """Return the records at the beginning that have the first one's header: a program's samples have one size.

    The eight bytes before the length of the sample are compared: that follows from the length of the record.
    """
    heads = [head for (head,) in _heads(length).iter_unpack(data)]
    if heads.count(heads[0]) == len(heads):
        return data
    return data[: length * next(index for index, head in enumerate(heads) if head != heads[0])]


@lru_cache(maxsize=8)
def _heads(length: int) -> struct.Struct:
    """Return a layout that unpacks kind, flags and length, as one number, of records of one length."""
    return struct.Struct(f"=Q{length - 8}x")


@lru_cache(maxsize=8)
def _samples(length: int, raw_length: int) -> struct.Struct:
    """Return a layout that unpacks what samples hold, from records of one length."""
    return struct.Struct(f"{_RECORD.size}x{raw_length}s{length - _RECORD.size - raw_length}x")


class _Ring:
    """One CPU's ring, as in perf_event_mmap_page: a page of positions, then the data."""

    _HEAD, _TAIL = 1024, 1032

    def __init__(self, base: int, size: int) -> None:
        self.size = size
        self.head = ctypes.c_uint64.from_address(base + self._HEAD)
        """Where the kernel writes next; it only ever grows."""
        self.tail = ctypes.c_uint64.from_address(base + self._TAIL)
        """Up to where the kernel may overwrite."""
        self.position = self.tail.value
        """Up to where we have read."""
        data = (ctypes.c_char * size).from_address(base + resource.getpagesize())
        self.data = memoryview(data).cast("B")

    def ahead(self, head: int) -> bytes:
        """Return the unread bytes up to a position as one piece, even if they wrap around; at most LOOK bytes."""
        start, length = self.position % self.size, min(head - self.position, LOOK)
        piece = bytes(self.data[start : start + length])
        return piece if len(piece) == length else piece + bytes(self.data[: length - len(piece)])


_SOFTWARE, _BPF_OUTPUT, _RAW = 1, 10, 1 << 10
"""PERF_TYPE_SOFTWARE, PERF_COUNT_SW_BPF_OUTPUT, PERF_SAMPLE_RAW."""
LOOK = 1 << 16
"""Bytes of a ring read at once: any record fits, as its length has 16 bits."""
_RECORD = struct.Struct("=IHHI")
"""perf_event_header and the length of a sample's data."""
_RECORD_LOST, _RECORD_SAMPLE = 2, 9
_ORDERED = platform.machine() in ("x86_64", "i686")
"""Loads stay in order here, and stores stay behind them, without a barrier."""
