"""The holder: a small process that keeps parked packets while the agent resolves their addresses.

The agent starts it, in its own session, with one end of a socket pair; when the other end closes, it gives everything
back and ends. So a crash of the agent loses no parked packet, and a crash of the holder only those that it holds: the
next packet is not parked. It reads maps and the TAP, and imports neither BCC, gRPC nor pyroute2.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import mmap
import os
import selectors
import socket
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lazymesh.core.hold import Frame, HoldQueues, Return, Why
from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import Map, open_pin
from lazymesh.datapath.pins import HOLD_FILTER
from lazymesh.datapath.tap import READ_SIZE, VNET_HEADER, Tap, open_tap
from lazymesh.errors import DatapathError
from lazymesh.roles.holdwire import ANSWER, ANSWERS, BEGIN, CAUSES, ERROR, GO, ON, QUIT, SETTINGS, UP

if TYPE_CHECKING:
    from collections.abc import Iterable

BEAT_S = 0.02
READS_PER_TURN = 64
SWEEP_S = 0.25
LOST_AFTER_S = 1.0
"""A packet given back this long ago that has not arrived never will."""
DRAIN_S = 0.02
"""For this long after parking is switched off, a program that has read the old value may still park."""
FORGET_S = 60.0
"""Between closures of the accounts of interfaces that are gone."""
RUNT = 60
"""Length of the frame that stands for a dropped one."""

_HELD = frozenset(Why)


class Mapped:
    """Array maps mapped into memory: slots, control, and the counters that only the holder writes."""

    def __init__(self, pins: Path) -> None:
        self._maps = [Map.pinned(pins / name) for name in ("lm_slots", "lm_hold_control", "lm_holder_stats")]
        views = [mmap.mmap(m.fd, _pages(m.layout.value_size * m.layout.max_entries)) for m in self._maps]
        self.slots = (abi.Slot * self._maps[0].layout.max_entries).from_buffer(views[0])
        self.control = abi.HoldControl.from_buffer(views[1])
        self.stats = abi.HolderStats.from_buffer(views[2])


def _pages(size: int) -> int:
    return (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE


def reset(pins: Path, mapped: Mapped) -> None:
    """Reset the maps as if nothing had ever been parked; count packets still out as lost."""
    forget(pins, mapped)
    free = Map.pinned(pins / "lm_hold_free")
    free.drain()
    for slot in range(len(mapped.slots)):
        free.push(slot.to_bytes(4, sys.byteorder))
    free.close()


def forget(pins: Path, mapped: Mapped) -> None:
    """Reset all but the queue of free slots."""
    mapped.control.tap_ifindex = 0
    time.sleep(DRAIN_S)  # a program that read the old value may still be parking
    # Counted in a copy: what arrives meanwhile must not be counted twice.
    found = type(mapped.slots).from_buffer_copy(mapped.slots)
    ctypes.memset(mapped.slots, 0, ctypes.sizeof(mapped.slots))
    words = ctypes.sizeof(abi.Slot) // 4
    states = memoryview(found).cast("B").cast("I")[abi.Slot.state.offset // 4 :: words]
    mapped.stats.lost += len(states) - states.tolist().count(abi.SLOT_FREE)
    bucket, total = Map.pinned(pins / "lm_hold_bucket"), Map.pinned(pins / "lm_hold_total")
    bucket.zero()
    total.zero()
    interfaces = Map.pinned(pins / "lm_hold_if")
    interfaces.delete_many([key for key, _ in interfaces.items()])
    for each in (bucket, total, interfaces):
        each.close()


class Holder:
    """The loop that connects TAP, queues and agent."""

    def __init__(self, tap: Tap, pins: Path, mapped: Mapped, agent: socket.socket) -> None:
        self._tap = tap
        self._mapped = mapped
        self._agent = agent
        self._queues = HoldQueues()
        self._written: list[tuple[float, int, int]] = []
        """Packets given back: when, slot, and its time of parking, which differs once the slot is used again."""
        self._interfaces = Map.pinned(pins / "lm_hold_if")
        self._next_sweep = self._next_forget = 0.0
        self._ending = False

    def run(self) -> None:
        """Work until the agent closes its end of the socket, or sends QUIT."""
        selector = selectors.DefaultSelector()
        selector.register(self._tap.fd, selectors.EVENT_READ, self._read_tap)
        selector.register(self._agent, selectors.EVENT_READ, self._read_agent)
        while not self._ending:
            now = time.monotonic()
            self._mapped.control.holder_beat_ns = time.monotonic_ns()
            deadline = self._queues.next_deadline()
            wait = BEAT_S if deadline is None else min(BEAT_S, max(0.0, deadline - now))
            for key, _ in selector.select(wait):
                key.data()
            now = time.monotonic()
            self._give_back(self._queues.expire(now))
            self._tidy(now)
        self._end()

    def _tidy(self, now: float) -> None:
        if now >= self._next_sweep:
            self._sweep(now)
            self._next_sweep = now + SWEEP_S
        if now >= self._next_forget:
            self._forget_interfaces()
            self._next_forget = now + FORGET_S

    def _read_tap(self) -> bool:
        """Read what waits in the TAP, up to one turn's share; tell whether there was anything."""
        for count in range(READS_PER_TURN):
            try:
                data = os.read(self._tap.fd, READ_SIZE)
            except BlockingIOError:
                return count > 0
            except OSError:  # the device was deleted: the agent starts another holder
                self._ending = True
                return False
            frame = frame_of(data, self._mapped.slots)
            if frame is None:
                self._mapped.stats.strays += 1
            else:
                back = self._queues.park(frame)
                if back is not None:
                    self._give_back((back,))
        return True

    def _read_agent(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while not self._ending:
                try:
                    datagram = self._agent.recv(65_536)
                except ConnectionError:  # the agent was killed before it read everything
                    datagram = b""
                self._obey(datagram)

    def _obey(self, datagram: bytes) -> None:
        kind, body = datagram[:1], datagram[1:]
        if kind in (b"", QUIT):
            self._ending = True
        elif kind == ANSWERS:
            for number, address, since in ANSWER.iter_unpack(body):
                self._give_back(self._queues.answer(address, CAUSES[number], since))
        elif kind == SETTINGS:
            settings = json.loads(body)
            self._queues.limit_s = settings["limit_s"]
            self._queues.drop_on_timeout = settings["drop_on_timeout"]
        elif kind == GO:
            self._mapped.control.udp_gso = self._tap.udp_gso
            self._mapped.control.holder_beat_ns = time.monotonic_ns()
            self._mapped.control.tap_ifindex = self._tap.ifindex
            with contextlib.suppress(BrokenPipeError):  # the next read notices it, too
                self._agent.send(ON)

    def _give_back(self, returns: Iterable[Return]) -> None:
        stats = self._mapped.stats
        for item in returns:
            frame = item.frame
            if self._mapped.slots[frame.slot].parked_ns != frame.parked_ns:
                continue  # another holder has taken over and counted it as lost
            self._written.append((time.monotonic(), frame.slot, frame.parked_ns))
            if item.discard:
                self._discard(frame.slot)
            else:
                self._write(frame.data)
            setattr(stats, item.cause.value, getattr(stats, item.cause.value) + 1)

    def _discard(self, number: int) -> None:
        """Make the kernel uncount and drop a packet: a runt with its token stands for it."""
        slot = self._mapped.slots[number]
        slot.state = abi.SLOT_DISCARD
        token = struct.pack(">2sHH", b"\x02\x4c", slot.parked_ns >> 10 & 0xFFFF, number)
        self._write(bytes(VNET_HEADER) + b"\x02" + bytes(5) + token + b"\x08\x00" + bytes(RUNT - 14))

    def _write(self, data: bytes | memoryview) -> None:
        try:
            os.write(self._tap.fd, data)
        except OSError:
            self._mapped.stats.write_errors += 1  # the sweep finds its slot

    def _sweep(self, now: float) -> None:
        """Find what was given back and never arrived, and have it uncounted; repeat until it is."""
        late = list(itertools.takewhile(lambda item: item[0] <= now - LOST_AFTER_S, self._written))
        still_out = []
        for written, number, parked_ns in late:
            slot = self._mapped.slots[number]
            if slot.parked_ns == parked_ns and slot.state != abi.SLOT_FREE:
                self._mapped.stats.never_arrived += slot.state != abi.SLOT_DISCARD
                self._discard(number)
                still_out.append((written, number, parked_ns))
        self._written[: len(late)] = still_out

    def _forget_interfaces(self) -> None:
        """Close the accounts of interfaces that are gone: pods come and go, and room is limited."""
        # One by one, as the kernel's list of interfaces waits for its lock over them (netlinkthread.py).
        keys = [key for key, _ in self._interfaces.items()]
        self._interfaces.delete_many(
            [key for key in keys if not _is_here(int.from_bytes(key, sys.byteorder))]
        )

    def _end(self) -> None:
        """Stop parking; give back what waits and what is still in the ring."""
        if self._mapped.control.tap_ifindex == self._tap.ifindex:  # else another holder has taken over
            self._mapped.control.tap_ifindex = 0
        self._give_back(self._queues.drain())
        until = time.monotonic() + DRAIN_S
        while time.monotonic() < until:
            if self._read_tap():  # this ends, even with a full ring, as nothing more is parked
                self._give_back(self._queues.drain())
                until = time.monotonic() + DRAIN_S
            else:
                time.sleep(0.001)


def frame_of(data: bytes, slots: ctypes.Array[abi.Slot]) -> Frame | None:
    """Return the parked packet read from the TAP; its slot's number is at the end of its source MAC."""
    number = int.from_bytes(data[VNET_HEADER + 10 : VNET_HEADER + 12], "big")
    if number >= len(slots) or slots[number].hold not in _HELD:
        return None  # never parked, or another holder has taken over and reset the slots
    slot = slots[number]
    key = bytes((slot.family,)) + bytes(slot.addr)
    return Frame(number, key, slot.parked_ns, Why(slot.hold), data)


def _is_here(index: int) -> bool:
    try:
        socket.if_indextoname(index)
    except OSError:
        return False
    return True


def main() -> None:
    """Run as ``python -m lazymesh.roles.holder FD PINS``; begin when the agent says so."""
    agent, pins = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    holder = None
    # The agent may have been killed meanwhile; its successor starts another holder.
    with contextlib.suppress(ConnectionError):
        if agent.recv(1) == BEGIN:
            holder = _start(agent, pins)
    if holder is not None:
        holder.run()


def _start(agent: socket.socket, pins: Path) -> Holder | None:
    """Return a holder, reported to the agent as up; None when it cannot work, with the reason reported."""
    try:
        tap = open_tap()  # first: until this succeeds, an older holder may be giving back its packets
        tap.set_filter(open_pin(pins / HOLD_FILTER))
        mapped = Mapped(pins)
        reset(pins, mapped)
    except (DatapathError, OSError) as exc:
        agent.send(ERROR + str(exc).encode())
        return None
    agent.send(UP + json.dumps({"ifindex": tap.ifindex, "name": tap.name}).encode())
    agent.setblocking(False)
    return Holder(tap, pins, mapped, agent)


if __name__ == "__main__":
    main()
