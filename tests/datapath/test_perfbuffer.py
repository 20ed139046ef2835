"""Perf rings: every record once, whatever lies between them, and nothing left open behind us."""

from __future__ import annotations

import ctypes
import resource
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymesh.datapath import libbpf, perfbuffer
from lazymesh.datapath.libbpf import BPF_F_NO_PREALLOC, Map, MapLayout
from lazymesh.datapath.perfbuffer import PerfBuffer
from tests.datapath.conftest import open_descriptors

HASH = MapLayout(libbpf.MAP_TYPE_HASH, 4, 8, 20_000, BPF_F_NO_PREALLOC)
MAP_TYPE_PERF_EVENT_ARRAY = 4
PERF = MapLayout(MAP_TYPE_PERF_EVENT_ARRAY, 4, 4, libbpf.possible_cpus(), 0)


def test_perf_buffer_on_another_kind_of_map_is_refused() -> None:
    """An OSError with the kernel's number, not a crash."""
    made = Map.create("lm_test", HASH)
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            PerfBuffer(made, 1, print)
    finally:
        made.close()


def test_perf_buffer_gives_everything_back() -> None:
    """A ring per CPU, and after close not one descriptor more than before; closing twice does no harm."""
    made = Map.create("lm_test", PERF)
    before = open_descriptors()
    for _ in range(3):
        ring = PerfBuffer(made, 1, print)
        assert open_descriptors() > before
        ring.consume()
        ring.close()
        ring.close()
    assert open_descriptors() == before
    made.close()


class Ring:
    """Memory that looks like a CPU's ring, and the kernel's side of it."""

    def __init__(self, pages: int) -> None:
        self.size = pages * resource.getpagesize()
        self._memory = ctypes.create_string_buffer(resource.getpagesize() + self.size)
        self.reader = perfbuffer._Ring(ctypes.addressof(self._memory), self.size)
        self._data = self.reader.data

    def write(self, kind: int, misc: int, body: bytes) -> bool:
        """Append a record if there is room."""
        record = struct.pack("=IHH", kind, misc, 8 + len(body)) + body
        head = self.reader.head.value
        if head + len(record) - self.reader.tail.value > self.size:
            return False
        for index, byte in enumerate(record):
            self._data[(head + index) % self.size] = byte
        self.reader.head.value = head + len(record)
        return True


RECORDS = st.one_of(
    st.tuples(st.just(9), st.integers(0, 1), st.sampled_from([12, 44, 44, 44, 60])),
    st.tuples(st.just(2), st.just(0), st.just(20)),
    st.tuples(st.integers(3, 8), st.just(0), st.just(28)),
)
"""Kind, flags, and the length behind the head: samples that are mostly alike, losses, others."""


@settings(deadline=None)
@given(
    records=st.lists(st.tuples(RECORDS, st.integers(1, 90)), max_size=8),
    limit=st.integers(1, 200),
    look=st.sampled_from([128, 1_000, perfbuffer.LOOK]),
)
def test_records_are_read_whatever_lies_between_them(
    records: list[tuple[tuple[int, int, int], int]], limit: int, look: int
) -> None:
    """Each sample once and in order, never more at once than was asked for, and every loss counted."""
    made = Map.create("lm_test", PERF)
    memory, samples, expected, lost = Ring(1), list[bytes](), list[bytes](), 0
    buffer = PerfBuffer(made, 1, samples.extend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perfbuffer, "LOOK", look)
        patch.setattr(buffer, "_rings", [memory.reader])
        for (kind, misc, length), count in records:
            for _ in range(count):
                number = len(expected).to_bytes(4, "little")
                body = {
                    9: (length - 4).to_bytes(4, "little") + number,
                    2: bytes(8) + (3).to_bytes(8, "little"),
                }
                while not memory.write(kind, misc, body.get(kind, b"").ljust(length, b"x")):
                    before = len(samples)
                    buffer.consume(limit)
                    assert len(samples) - before <= limit
                if kind == 9:
                    expected.append(number.ljust(length - 4, b"x"))
                lost += 3 * (kind == 2)
        while buffer.consume(limit):
            pass
    buffer.close()
    made.close()
    assert samples == expected
    assert buffer.lost == lost
