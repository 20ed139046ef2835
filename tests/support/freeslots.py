"""The queue of free slots, emptied and filled in the kernel.

A system call for each slot takes seconds where the processor is emulated.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lazymesh.datapath import libbpf
from lazymesh.datapath.libbpf import Map, MapLayout
from tests.support.assembly import count, leave, load, lookup, map_in, op
from tests.support.prog_run import run_packet

if TYPE_CHECKING:
    from pathlib import Path

_PUSH, _POP = 87, 88
"""Numbers of bpf_map_push_elem and bpf_map_pop_elem."""


class FreeSlots:
    """Two programs that are run once for each slot, and a counter of what they have pushed or popped."""

    def __init__(self, pins: Path) -> None:
        self.queue = Map.pinned(pins / "lm_hold_free")
        self._counter = Map.create("lm_test", MapLayout(libbpf.MAP_TYPE_ARRAY, 4, 4, 1, 0))
        self._push, self._pop = (load(self._code(helper)) for helper in (_PUSH, _POP))

    def close(self) -> None:
        """Let maps and programs go."""
        for descriptor in (self._push, self._pop):
            os.close(descriptor)
        self._counter.close()
        self.queue.close()

    def drain(self) -> int:
        """Empty the queue; return how many it held."""
        return self._run(self._pop)

    def fill(self) -> None:
        """Put every slot into the empty queue."""
        assert self._run(self._push) == self.queue.layout.max_entries

    def _run(self, program: int) -> int:
        self._counter.update(bytes(4), bytes(4))
        run_packet(program, bytes(60), repeat=self.queue.layout.max_entries)
        return int.from_bytes(self._counter.lookup(bytes(4)) or b"", "little")

    def _code(self, helper: int) -> bytes:
        """Return a program that pushes the counter's value, or pops one, and counts it."""
        end = leave(0)
        step = op(0xBF, 6, 0) + op(0x61, 7, 6) + op(0x63, 10, 7, -8)  # r7 = counter, also on the stack
        step += map_in(1, self.queue.fd) + op(0xBF, 2, 10) + op(0x07, 2, immediate=-8)
        step += op(0xB7, 3) + op(0x85, immediate=helper)
        step += op(0x55, 0, offset=2) + op(0x07, 7, immediate=1) + op(0x63, 6, 7)
        begin = op(0x62, 10, offset=-4) + lookup(self._counter.fd, -4)
        return begin + op(0x15, 0, offset=count(step)) + step + end
