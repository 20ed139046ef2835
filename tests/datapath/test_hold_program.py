"""Holding without a holder: real frames from a pod's interface, and a test that plays the process at the TAP.

A pod's namespace and a node's, joined by a veth with our program on it; a follower behind it writes down what passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import json
import os
import random
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet6 import IPv6ExtHdrDestOpt

from lazymesh.core.hold import Cause, Return, Why
from lazymesh.core.model import Direction, Entry, parse_address
from lazymesh.datapath import abi, libbpf, programs
from lazymesh.datapath.holdmaps import HoldControl, HoldCounterMap, HoldLimits
from lazymesh.datapath.hooks import prepare_tap
from lazymesh.datapath.perfbuffer import PerfBuffer
from lazymesh.datapath.pins import HOLD_FILTER, Pins
from lazymesh.datapath.program import open_own_ipcache
from lazymesh.datapath.settingsmap import DatapathConfig, OnMiss
from lazymesh.datapath.tap import VNET_HEADER, open_tap
from lazymesh.roles.holder import ANSWER, BEGIN, QUIT, Holder, Mapped, forget, frame_of, reset
from tests.support import packets
from tests.support.etcd import wait_until
from tests.support.follower import Follower, Seen
from tests.support.freeslots import FreeSlots
from tests.support.loaded import load
from tests.support.namespaces import NamespaceSet
from tests.support.packets import POD_B1, POD_B2, Flow, pod_of_b
from tests.support.prog_run import _SkBuff, run_packet

if TYPE_CHECKING:
    from collections.abc import Iterator

COOKIE = 0xC4D
_PACKET_VNET_HDR, _TUNSETOFFLOAD = 15, 0x400454D0
_SOL_PACKET, _SO_MARK = 263, 36
POD_MAC = bytes.fromhex("020000000001")


class HoldBench:
    """One TAP, one pod, and the maps between them."""

    def __init__(self, stack: contextlib.ExitStack, bpffs: Path) -> None:
        self.datapath = load(Pins.under(bpffs), 1_000)
        stack.callback(self.datapath.close)
        self.ipcache = open_own_ipcache(self.datapath.pins, 1_000)
        self.datapath.visible.show([self.ipcache])
        stack.callback(self.ipcache.close)
        self.pins = self.datapath.pins.directory
        spaces = stack.enter_context(NamespaceSet(["node", "pod"]))
        self.node, self.pod = spaces["node"], spaces["pod"]
        for space in (self.node, self.pod):  # only the tests send
            space.sysctl({f"ipv6/conf/{scope}/disable_ipv6": 1 for scope in ("all", "default")})
        self.pod.ip([f"link add eth0 type veth peer name lxc0 netns {self.node.name}", "link set eth0 up"])
        self.node.ip(["link set lxc0 up", "link set lo up"])
        self.ifindex = self.node.call(socket.if_nametoindex, "lxc0")
        self.node.run("tc", "qdisc", "add", "dev", "lxc0", "clsact")
        self.attach()
        self.tap = self.node.call(open_tap)
        stack.callback(os.close, self.tap.fd)
        self.tap.set_filter(libbpf.open_pin(self.pins / HOLD_FILTER))
        self.node.call(lambda: asyncio.run(prepare_tap(self.datapath, self.tap.ifindex, self.tap.name)))
        self.mapped = Mapped(self.pins)
        self.free = FreeSlots(self.pins)
        stack.callback(self.free.close)
        self.control = HoldControl(self.pins)
        self._counters = HoldCounterMap(self.pins)
        stack.callback(self._counters.close)
        self._signals = PerfBuffer(self.datapath.signals.events, 8, lambda _raw: None)
        stack.callback(self._signals.close)
        self.socket = self._pod_socket(vnet=False)
        self.gso_socket = self._pod_socket(vnet=True)
        stack.callback(self.socket.close)
        stack.callback(self.gso_socket.close)

    def attach(self) -> None:
        """Put our program on the pod's interface."""
        pin = str(self.pins / "lm_from_pod")
        where = ("dev", "lxc0", "ingress", "prio", "49000", "protocol", "all")
        self.node.run("tc", "filter", "add", *where, "bpf", "direct-action", "pinned", pin)

    def _pod_socket(self, *, vnet: bool) -> socket.socket:
        sock = self.pod.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        if vnet:
            sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        sock.bind(("eth0", 0))
        return sock

    def clear(self) -> None:
        """Start over: nothing parked, nothing known, every counter zero, no stale heartbeat."""
        forget(self.pins, self.mapped)
        self.free.drain()
        self.free.fill()
        self._signals.consume()
        for name in ("lm_ipcache", "lm_dedup", "lm_windows", "lm_rate"):
            opened = libbpf.Map.pinned(self.pins / name)
            opened.delete_many([key for key, _ in opened.items()])
            opened.close()
        for name, size in (("lm_hold_count", abi.HoldCounters), ("lm_counters", abi.Counters)):
            opened = libbpf.Map.pinned(self.pins / name)
            opened.update(bytes(4), bytes(ctypes.sizeof(size) * libbpf.possible_cpus()))
            opened.close()
        self.datapath.config.write(DatapathConfig(on_miss=OnMiss.HOLD))
        self.datapath.config.change(hold_cookie=COOKIE)
        self.control.set_limits(HoldLimits(), 0.25)
        words = self.mapped.control
        words.agent_beat_ns = words.holder_beat_ns = time.monotonic_ns() + 10**12
        words.udp_gso = self.tap.udp_gso
        words.tap_ifindex = self.tap.ifindex
        fcntl.ioctl(self.tap.fd, _TUNSETOFFLOAD, 0x6F if self.tap.udp_gso else 0x0F)

    def is_connected(self) -> bool:
        """Send a packet, and tell whether the program has seen it: the kernel opens a new link in its own time."""
        self.send(Flow().udp())
        return self.datapath.counters.read(Direction.EGRESS).missed > 0

    def send(self, frame: bytes) -> None:
        """Have the pod send a frame; the program has seen it when this returns."""
        self.socket.send(frame)

    def send_gso(self, frame: bytes, kind: int, start: int, check: int, size: int = 1_000) -> None:
        """Make it send one that must be segmented later."""
        self.gso_socket.send(struct.pack("=BBHHHH", 1, kind, start + 20, size, start, check) + frame)

    def read(self) -> bytes:
        """Return the next parked packet, with its virtio header."""
        assert self.waits(1.0), "nothing was parked"
        return os.read(self.tap.fd, 1 << 17)

    def waits(self, seconds: float = 0.0) -> bool:
        """Tell whether a parked packet waits to be read."""
        with selectors.DefaultSelector() as selector:  # select() knows no descriptor above 1023
            selector.register(self.tap.fd, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def write(self, data: bytes) -> None:
        """Give a frame back."""
        os.write(self.tap.fd, data)

    def install(self, *hosts: packets.Host) -> None:
        """Put entries of peers in."""
        for host in hosts:
            for text in (host.v4, host.v6):
                self.ipcache.replace(parse_address(text), Entry(131_073))

    def counts(self) -> dict[str, int]:
        """Return what holding has counted, without zeros."""
        return {name: n for name, n in self._counters.kernel().items() if n}

    def settled(self) -> bool:
        """Tell whether no account has anything on it, neither packets nor bytes."""
        for name in ("lm_hold_if", "lm_hold_bucket", "lm_hold_total"):
            accounts = libbpf.Map.pinned(self.pins / name)
            busy = any(raw[:16] != bytes(16) for _, raw in accounts.items())
            accounts.close()
            if busy:
                return False
        return True

    def out(self) -> int:
        """Return how many packets are out, as the kernel counts them."""
        total = libbpf.Map.pinned(self.pins / "lm_hold_total")
        raw = total.lookup(bytes(4)) or b""
        total.close()
        return int(abi.Outstanding.from_buffer_copy(raw).packets)

    def slot(self, frame: bytes) -> abi.Slot:
        """Return the slot of a frame that was read."""
        slot: abi.Slot = self.mapped.slots[slot_number(frame)]
        return slot

    def passed(self) -> int:
        """Return how many packets were signalled, suppressed or anything else, but counted as missed."""
        return self.datapath.counters.read(Direction.EGRESS).signalled


def slot_number(frame: bytes) -> int:
    """Return the number in a frame's token."""
    assert frame[VNET_HEADER + 6 : VNET_HEADER + 8] == b"\x02\x4c"
    return int.from_bytes(frame[VNET_HEADER + 10 : VNET_HEADER + 12], "big")


def discarding(frame: bytes) -> bytes:
    """Return the runt that stands for a frame to be dropped."""
    return bytes(VNET_HEADER) + b"\x02" + bytes(5) + frame[VNET_HEADER + 6 :][:6] + b"\x08\x00" + bytes(46)


@pytest.fixture(scope="module")
def shared() -> Iterator[HoldBench]:
    """Load once."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="lm-hold-"))
        subprocess.run(["mount", "-t", "bpf", "bpf", directory], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", directory], check=True)
        bench = HoldBench(stack, Path(directory))
        bench.datapath.mesh_cidrs.apply(
            [(ipaddress.ip_network(c), 2) for c in packets.PODS_OF_B.values()], []
        )
        wait_until(bench.is_connected, 10, "the pod's link")
        yield bench


@pytest.fixture
def bench(shared: HoldBench) -> HoldBench:
    """Return it as new."""
    while shared.waits():
        os.read(shared.tap.fd, 1 << 17)
    shared.clear()
    return shared


@pytest.fixture
def follower(bench: HoldBench) -> Iterator[Follower]:
    """Return a program behind ours that knows pod b1's IPv4 key."""
    with Follower(bench.node, "lxc0", bench.pins, abi.pack_address_key(POD_B1.address(4))) as behind:
        yield behind


def arrivals(follower: Follower, count: int) -> Seen:
    """Wait until the follower has seen that many packets."""

    def look() -> Seen | None:
        seen = follower.seen()
        return seen if seen.with_entry + seen.without_entry == count else None

    found: Seen = wait_until(look, 2, lambda: f"{count} packets behind us, not {follower.seen()}")
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_a_parked_packet_comes_back_as_it_was(bench: HoldBench, version: int) -> None:
    """Same bytes but for the token, same interface; marks and MAC addresses are restored."""
    sent = Flow(version=version).udp(b"hello")
    with Follower(bench.node, "lxc0", bench.pins, abi.pack_address_key(POD_B1.address(version))) as behind:
        bench.send(sent)
        frame = bench.read()
        body = frame[VNET_HEADER:]
        assert body[:6] + POD_MAC + body[12:] == sent
        slot = bench.slot(frame)
        assert (slot.ifindex, slot.length, slot.hold) == (bench.ifindex, len(sent), Why.FIRST)
        assert slot.family == (1 if version == 4 else 2)
        assert bytes(slot.addr) == POD_B1.address(version).ljust(16, b"\0")
        assert behind.seen().without_entry == 0
        assert bench.out() == 1
        bench.install(POD_B1)
        bench.write(frame)
        seen = arrivals(behind, 1)
    assert (seen.source_mac, seen.mark, seen.length) == (POD_MAC, 0, len(sent))
    assert seen.hash == slot.hash != 0
    assert (seen.with_entry, seen.without_entry) == (1, 0)
    assert bench.counts() == {"held": 1, "returned": 1}
    assert bench.out() == 0
    assert slot.state == abi.SLOT_FREE


def test_the_mark_a_packet_had_is_put_back(bench: HoldBench) -> None:
    """An earlier mark is restored; a stale one of ours is removed, and no other."""
    slot, mine = bench.mapped.slots[3], mark_of(3)
    slot.state, slot.mark = abi.SLOT_RETURNING, 0x77
    for mark, ifindex, after in (
        (mine + (1 << 20), 1, mine + (1 << 20)),
        (mine | 0x200, 1, mine | 0x200),  # Cilium: to the proxy
        (mine | 0x4000, 1, mine | 0x4000),  # kube-proxy: to be masqueraded
        (mark_of(4), 1, 0),
        (mine, 2, 0),
        (mine, 1, 0x77),
        (mine, 1, 0),  # spent
    ):
        slot.ifindex = ifindex
        assert mark_after(bench, mark) == after
    assert bench.counts() == {"returned": 1}


@pytest.mark.parametrize("direction", list(Direction), ids=["egress", "ingress"])
def test_a_parked_packets_mark_is_kept(bench: HoldBench, direction: Direction) -> None:
    """It is not in the frame itself."""
    program, frame = bench.datapath.program(direction)[1], Flow(direction=direction).udp()
    run = bench.node.call(lambda: run_packet(program, frame, ifindex=bench.ifindex, mark=0x77))
    assert run.verdict == bench.datapath.config.read().park_verdict
    slot = bench.slot(bench.read())
    assert (slot.mark, slot.ifindex) == (0x77, bench.ifindex)
    assert bytes(slot.addr[:4]) == POD_B1.address(4)


def test_the_verdict_of_a_parked_packet_is_what_the_settings_say(
    bench: HoldBench, follower: Follower
) -> None:
    """Which one ends its way depends on the hook; where it is "next", the follower sees what was parked, too."""
    bench.datapath.config.change(park_verdict=0xFFFFFFFF)
    bench.send(Flow().udp())
    arrivals(follower, 1)
    bench.install(POD_B1)
    bench.send(Flow().udp())
    arrivals(follower, 2)
    assert bench.counts() == {"held": 1, "gated": 1}


def test_nothing_is_parked_where_missed_packets_pass(bench: HoldBench, follower: Follower) -> None:
    """The holder of before may still be there."""
    bench.datapath.config.change(on_miss=OnMiss.PASS)
    for _ in range(2):
        bench.send(Flow().udp())
    arrivals(follower, 2)
    assert bench.counts() == {}


def mark_of(number: int) -> int:
    """Return the mark of a packet on its way back, by its slot."""
    return COOKIE << 20 | (number >> 10) << 16 | (number >> 8 & 3) << 12 | number & 0xFF


@pytest.mark.parametrize("number", [0, 0xFF, 0x100, 0x2AA, 0x1555, 0x3FFF])
def test_a_packet_that_comes_back_past_us_means_nothing_to_others(
    bench: HoldBench, follower: Follower, number: int
) -> None:
    """Our program is removed just then: Cilium and kube-proxy see none of their bits in the mark."""
    bench.free.drain()
    for _ in range(2):
        bench.free.queue.push(number.to_bytes(4, sys.byteorder))
    for peer, back in ((POD_B1, False), (POD_B2, True)):
        bench.send(Flow(peer=peer).udp())
        frame = bench.read()
        assert slot_number(frame) == number
        if not back:
            bench.node.run("tc", "filter", "del", "dev", "lxc0", "ingress", "prio", "49000")
        try:
            bench.write(frame)
            seen = arrivals(follower, 2 if back else 1)
        finally:
            if not back:
                bench.attach()
        assert seen.mark == (0 if back else mark_of(number))
        assert not mark_of(number) & 0xCF00
    assert bench.counts() == {"held": 2, "returned": 1}


def mark_after(bench: HoldBench, mark: int) -> int:
    """Run a packet of no cluster with a mark through the program; return the mark that it leaves with."""
    frame = Flow(peer=packets.INTERNET).udp()
    before, after = _SkBuff(mark=mark, ifindex=1), _SkBuff()
    options = programs.TestRunOpts(
        sz=ctypes.sizeof(programs.TestRunOpts),
        data_in=frame,
        data_size_in=len(frame),
        ctx_in=ctypes.addressof(before),
        ctx_size_in=ctypes.sizeof(before),
        ctx_out=ctypes.addressof(after),
        ctx_size_out=ctypes.sizeof(after),
        repeat=1,
    )
    program = bench.datapath.program(Direction.EGRESS)[1]
    assert libbpf.library().bpf_prog_test_run_opts(program, ctypes.byref(options)) == 0
    return int(after.mark)


def test_a_discarded_packet_is_counted_and_gone(bench: HoldBench, follower: Follower) -> None:
    """A runt with its token stands for it."""
    bench.send(Flow().udp())
    frame = bench.read()
    bench.slot(frame).state = abi.SLOT_DISCARD
    bench.write(discarding(frame))
    assert wait_until(lambda: bench.counts().get("discarded") == 1, 2)
    assert bench.out() == 0
    assert follower.seen().without_entry == 0


REFUSALS: dict[str, dict[str, int]] = {
    "refused_off": {"tap_ifindex": 0},
    "refused_address": {"address_packets": 0},
    "refused_interface": {"interface_packets": 0},
}


@pytest.mark.parametrize("counter", REFUSALS)
def test_a_refused_packet_passes_and_is_counted_by_cause(
    bench: HoldBench, follower: Follower, counter: str
) -> None:
    """Nothing is copied, nothing stays."""
    for name, value in REFUSALS[counter].items():
        setattr(bench.mapped.control, name, value)
    bench.send(Flow().udp())
    assert arrivals(follower, 1).source_mac == POD_MAC
    assert bench.counts() == {counter: 1}
    assert not bench.waits()


@pytest.mark.parametrize(("word", "limit_ms"), [("agent_beat_ns", 500), ("holder_beat_ns", 100)])
def test_a_heartbeat_that_is_too_old_refuses(
    bench: HoldBench, follower: Follower, word: str, limit_ms: int
) -> None:
    """Agent or holder hangs: half a second, or 100 ms, later nothing is parked; the beat alone brings it back."""
    setattr(bench.mapped.control, word, time.monotonic_ns() - (limit_ms + 1) * 1_000_000)
    bench.send(Flow().udp())
    arrivals(follower, 1)
    assert bench.counts() == {"refused_stale": 1}
    setattr(bench.mapped.control, word, time.monotonic_ns() + 10**9)
    bench.send(Flow(peer=POD_B2).udp())
    bench.read()
    assert bench.counts() == {"refused_stale": 1, "held": 1}


def test_an_agent_that_is_late_is_waited_for(bench: HoldBench) -> None:
    """It may still answer within the packet's time limit."""
    bench.mapped.control.agent_beat_ns = time.monotonic_ns() - 200_000_000
    bench.send(Flow().udp())
    bench.read()
    assert bench.counts() == {"held": 1}


@pytest.mark.parametrize("word", ["address_bytes", "interface_bytes", "total_bytes"])
def test_bytes_are_bounded_on_each_level(bench: HoldBench, follower: Follower, word: str) -> None:
    """One packet fits, the second does not, and passes."""
    first, second = Flow().udp(bytes(600)), Flow().udp(bytes(600))
    setattr(bench.mapped.control, word, 1_000)
    bench.send(first)
    bench.send(second)
    arrivals(follower, 1)
    assert bench.counts() == {"held": 1, "refused_bytes": 1}


def test_a_packet_that_just_fits_is_parked(bench: HoldBench) -> None:
    """A bound is the most that may be out, on each level; a byte less is too little."""
    length, out, peers = len(Flow().udp(bytes(600))), 0, map(pod_of_b, range(6))
    for word in ("address_bytes", "interface_bytes", "total_bytes"):
        most = length if word == "address_bytes" else out + length
        for bound in (most - 1, most):
            bench.control.set_limits(HoldLimits(), 0.25)
            setattr(bench.mapped.control, word, bound)
            bench.send(Flow(peer=next(peers)).udp(bytes(600)))
        out += length
        assert bench.counts() == {"held": out // length, "refused_bytes": out // length}


@pytest.mark.parametrize("burst", [1, 3])
def test_the_rate_is_of_addresses_and_of_one_interface(
    bench: HoldBench, follower: Follower, burst: int
) -> None:
    """One new address more than the burst is refused, a second packet of the first is not."""
    bench.control.set_limits(HoldLimits(interface_rate=1, interface_burst=burst), 0.25)
    for number in range(burst + 1):
        bench.send(Flow(peer=pod_of_b(number)).udp())
    bench.send(Flow(peer=pod_of_b(0)).udp())
    arrivals(follower, 1)
    assert bench.counts() == {"held": burst + 1, "refused_rate": 1}


@pytest.mark.parametrize("bit", range(8))
def test_neighbours_have_accounts_of_their_own(bench: HoldBench, follower: Follower, bit: int) -> None:
    """Addresses that differ in one bit, whichever it is: one is out, the other is neither bounded nor held by it."""
    other = ipaddress.ip_address(int(ipaddress.ip_address(POD_B1.v4)) ^ 1 << bit)
    peer = packets.Host("twin", str(other), POD_B1.v6)
    bench.control.set_limits(HoldLimits(address_packets=1), 0.25)
    bench.send(Flow().udp())
    bench.send(Flow(peer=peer).udp())
    assert bench.counts() == {"held": 2}
    bench.clear()
    bench.install(peer)
    bench.send(Flow().udp())
    bench.send(Flow(peer=peer).udp())
    arrivals(follower, 1)
    assert bench.counts() == {"held": 1}


def test_ipv6_neighbours_have_accounts_of_their_own(bench: HoldBench) -> None:
    """They may differ in any word of the address."""
    bench.control.set_limits(HoldLimits(address_packets=1), 0.25)
    address = int(ipaddress.ip_address(POD_B1.v6))
    for bit in (None, 0, 8, 31, 32, 40, 63, 64, 72):
        other = address if bit is None else address ^ 1 << bit
        peer = packets.Host("twin", POD_B1.v4, str(ipaddress.ip_address(other)))
        bench.send(Flow(peer=peer, version=6).udp())
    assert bench.counts() == {"held": 9}


def test_an_address_of_which_none_is_out_is_not_gated(bench: HoldBench, follower: Follower) -> None:
    """Its own have just come back; that others wait is nothing to it."""
    bench.send(Flow().udp())
    bench.send(Flow(peer=POD_B2).udp())
    frame = bench.read()
    bench.install(POD_B1)
    bench.write(frame)
    arrivals(follower, 1)
    bench.send(Flow().udp())
    arrivals(follower, 2)
    assert bench.counts() == {"held": 2, "returned": 1}


def test_what_comes_back_is_not_parked_again_behind_the_rest(bench: HoldBench, follower: Follower) -> None:
    """It was the first of its address, and is so again."""
    for _ in range(3):
        bench.send(Flow().udp())
    frames = [bench.read() for _ in range(3)]
    bench.install(POD_B1)
    for count, frame in enumerate(frames, 1):
        bench.write(frame)
        arrivals(follower, count)
    assert bench.counts() == {"held": 3, "returned": 3}
    assert not bench.waits()


def test_more_interfaces_than_there_are_accounts_pass(bench: HoldBench, follower: Follower) -> None:
    """What no account can be opened for is not parked, and counted."""
    accounts = libbpf.Map.pinned(bench.pins / "lm_hold_if")
    nothing = bytes(ctypes.sizeof(abi.Outstanding))
    numbers = range(1 << 20, (1 << 20) + accounts.layout.max_entries)
    accounts.update_many([(number.to_bytes(4, "little"), nothing) for number in numbers])
    accounts.close()
    bench.send(Flow().udp())
    arrivals(follower, 1)
    assert bench.counts() == {"park_failed": 1}


def test_slots_are_the_last_bound(bench: HoldBench, follower: Follower) -> None:
    """None is free: the packet passes, and no account has moved."""
    assert bench.free.drain() == len(bench.mapped.slots)
    bench.send(Flow().udp())
    arrivals(follower, 1)
    assert bench.counts() == {"refused_slots": 1}
    assert bench.out() == 0
    bench.free.queue.push(bytes(4))
    bench.send(Flow(peer=POD_B2).udp())
    bench.read()
    assert bench.counts() == {"refused_slots": 1, "held": 1}


def test_a_priority_tag_is_refused_and_a_vlan_is_none_of_ours(bench: HoldBench, follower: Follower) -> None:
    """A tag lives outside the frame and would be lost in the TAP."""
    bench.send(Flow().vlan(0))
    arrivals(follower, 1)
    assert bench.counts() == {"refused_vlan": 1}
    bench.send(Flow().vlan(5))
    arrivals(follower, 2)
    assert bench.counts() == {"refused_vlan": 1}
    assert bench.datapath.counters.read(Direction.EGRESS).not_parsed == 1


def test_what_is_not_ip_is_never_parked(bench: HoldBench, follower: Follower) -> None:
    """It has no address to wait for."""
    frames = packets.not_ip()
    for frame in frames.values():
        bench.send(frame)
    arrivals(follower, len(frames))
    assert bench.counts() == {}


@pytest.mark.parametrize(("version", "kind"), [(4, 1), (6, 4)])
def test_tcp_segments_are_parked_whole(bench: HoldBench, version: int, kind: int) -> None:
    """One packet in the TAP with its segment size and partial checksum, one packet back."""
    sent, start = Flow(version=version).tcp("A", bytes(8_000)), 34 if version == 4 else 54
    with Follower(bench.node, "lxc0", bench.pins, abi.pack_address_key(POD_B1.address(version))) as behind:
        bench.send_gso(sent, kind, start, 16)
        frame = bench.read()
        assert struct.unpack_from("=BBHHHH", frame) == (1, kind, start + 20, 1_000, start, 16)
        assert len(frame) == VNET_HEADER + len(sent)
        bench.install(POD_B1)
        bench.write(frame)
        assert arrivals(behind, 1).length == len(sent)
    assert bench.counts() == {"held": 1, "returned": 1}


@pytest.mark.parametrize("udp_gso", [0, 1])
def test_udp_segments_are_parked_where_the_tap_takes_them(
    bench: HoldBench, follower: Follower, udp_gso: int
) -> None:
    """Older kernels would cut them up; and take none from a packet socket, which is how the test sends them."""
    if not bench.tap.udp_gso:
        pytest.skip("needs Linux 6.2")
    bench.mapped.control.udp_gso = udp_gso
    bench.send_gso(Flow().udp(bytes(5_000)), 5, 34, 6)
    if udp_gso:
        assert len(bench.read()) > 5_000
        assert bench.counts() == {"held": 1}
    else:
        arrivals(follower, 1)
        assert bench.counts() == {"refused_gso": 1}


def test_what_is_no_bundle_of_segments_is_parked_by_any_tap(bench: HoldBench) -> None:
    """Whatever its protocol is, there is nothing to cut up."""
    bench.mapped.control.udp_gso = 0
    for number, shape in enumerate((Flow.udp, Flow.echo, Flow.later_fragment)):
        bench.send(shape(Flow(peer=pod_of_b(number))))
    assert bench.counts() == {"held": 3}


def test_segments_behind_something_else_are_refused(bench: HoldBench, follower: Follower) -> None:
    """Extension headers, tunnels: who knows whether the TAP takes such segments whole."""
    sent = bytearray(Flow(version=6).extensions(IPv6ExtHdrDestOpt(), flags="A") + bytes(5_000))
    sent[18:20] = (len(sent) - 54).to_bytes(2, "big")
    bench.send_gso(bytes(sent), 4, 62, 16)
    arrivals(follower, 1)
    assert bench.counts() == {"refused_gso": 1}


def test_what_the_tap_cuts_up_passes_whole(bench: HoldBench, follower: Follower) -> None:
    """Pieces share one token: none of them is queued, so that the packet itself passes."""
    fcntl.ioctl(bench.tap.fd, _TUNSETOFFLOAD, 0)
    sent = Flow().tcp("A", bytes(8_000))
    bench.send_gso(sent, 1, 34, 16)
    seen = arrivals(follower, 1)
    assert (seen.length, seen.source_mac) == (len(sent), POD_MAC)
    assert bench.counts() == {"park_failed": 1}
    assert bench.out() == 0
    assert not bench.waits()


def test_what_is_too_big_for_the_tap_passes(bench: HoldBench, follower: Follower) -> None:
    """BIG TCP, more than 64 KB in one packet: not parked, not segmented, counted."""
    try:
        bench.pod.ip(["link set eth0 gso_max_size 180000"])
    except RuntimeError as exc:
        pytest.skip(f"needs BIG TCP (Linux 5.19): {exc}")
    sent = bytearray(Flow(version=6).tcp("A", bytes(60_000)) + bytes(20_000))
    sent[18:20] = bytes(2)
    try:
        bench.send_gso(bytes(sent), 4, 54, 16)
    except OSError as exc:
        if exc.errno != errno.EMSGSIZE:
            raise
        pytest.skip("needs a kernel whose packet sockets take so much (6.1 does not)")
    assert arrivals(follower, 1).length == len(sent)
    assert bench.counts() == {"refused_size": 1}
    for length, peer in ((65_536, POD_B2), (65_535, pod_of_b(1))):
        sent[:54] = Flow(peer=peer, version=6).tcp("A")[:54]
        sent[18:20] = (length - 54).to_bytes(2, "big")
        bench.send_gso(bytes(sent[:length]), 4, 54, 16)
    assert len(bench.read()) == VNET_HEADER + 65_535
    assert bench.counts() == {"refused_size": 2, "held": 1}


def test_a_tap_that_is_down_costs_nothing(bench: HoldBench, follower: Follower) -> None:
    """clone_redirect reports it, and that very packet passes unchanged."""
    bench.node.ip([f"link set {bench.tap.name} down"])
    try:
        bench.send(Flow().udp())
        assert arrivals(follower, 1).source_mac == POD_MAC
    finally:
        bench.node.ip([f"link set {bench.tap.name} up"])
    assert bench.counts() == {"park_failed": 1}
    assert bench.settled()
    assert all_free(bench)


def all_free(bench: HoldBench) -> bool:
    """Tell whether no slot is in use, neither by its word nor by the queue of free ones; empties that."""
    states = {slot.state for slot in bench.mapped.slots}
    return bench.free.drain() == len(bench.mapped.slots) and states == {abi.SLOT_FREE}


def test_a_token_counts_at_the_tap_only(bench: HoldBench, follower: Follower) -> None:
    """A pod that sends a parked packet's token as its source MAC is parked like anybody, and keeps that MAC."""
    bench.send(Flow().udp(b"honest"))
    honest = bench.read()
    token = honest[VNET_HEADER + 6 :][:6]
    forged = Flow(peer=POD_B2).udp(b"forged")
    bench.send(forged[:6] + token + forged[12:])
    mine = bench.read()
    assert slot_number(mine) != slot_number(honest)
    bench.write(mine)
    assert arrivals(follower, 1).source_mac == token
    assert bench.counts() == {"held": 2, "returned": 1}
    bench.write(honest)
    assert arrivals(follower, 2).source_mac == POD_MAC


def test_a_mark_set_in_the_pod_counts_nowhere(bench: HoldBench) -> None:
    """The kernel takes it off at the border: the packet is parked like anybody's."""
    bench.send(Flow().udp())
    number = slot_number(bench.read())
    bench.mapped.slots[number].state = abi.SLOT_RETURNING
    bench.socket.setsockopt(socket.SOL_SOCKET, _SO_MARK, COOKIE << 16 | number)
    try:
        bench.send(Flow(peer=POD_B2).udp())
    finally:
        bench.socket.setsockopt(socket.SOL_SOCKET, _SO_MARK, 0)
    bench.read()
    assert bench.counts() == {"held": 2}


def test_a_token_is_good_for_one_return(bench: HoldBench, follower: Follower) -> None:
    """Given back twice, or after its slot has another packet, or made up: a stray, and it goes nowhere."""
    bench.send(Flow().udp())
    frame = bench.read()
    bench.install(POD_B1)
    bench.write(frame)
    arrivals(follower, 1)
    bench.write(frame)
    slot = bench.slot(frame)
    slot.state, slot.parked_ns = abi.SLOT_PARKED, slot.parked_ns + 1_024
    bench.write(frame)
    made_up = frame[: VNET_HEADER + 10] + b"\xff\xff" + frame[VNET_HEADER + 12 :]
    bench.write(made_up)
    slot.state = abi.SLOT_FREE
    wait_until(lambda: bench.counts().get("stray") == 3, 2)
    assert arrivals(follower, 1)
    assert bench.counts() == {"held": 1, "returned": 1, "stray": 3}


def test_a_frame_without_our_word_in_its_token_is_a_stray(bench: HoldBench) -> None:
    """Though slot and generation are right: it may be anybody's source MAC."""
    bench.send(Flow().udp())
    frame = bench.read()
    for byte in (6, 7):
        other = bytearray(frame)
        other[VNET_HEADER + byte] ^= 0x10
        bench.write(bytes(other))
    assert wait_until(lambda: bench.counts() == {"held": 1, "stray": 2}, 2)


def test_a_spent_token_opens_the_tap_to_nobody(bench: HoldBench, follower: Follower) -> None:
    """What it stood for has gone back; the node's own stack finds no way in by it."""
    bench.send(Flow().udp())
    frame = bench.read()
    bench.write(frame)
    arrivals(follower, 1)
    sock = bench.node.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
    with sock, contextlib.suppress(OSError):  # ENOBUFS: the drop, told to the sender
        sock.bind((bench.tap.name, 0))
        sock.send(frame[VNET_HEADER:])
    assert not bench.waits(0.05)


def test_nothing_but_parked_packets_enters_the_tap(bench: HoldBench) -> None:
    """Whatever the node's own stack sends to it, it stays silent."""
    sock = bench.node.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
    with sock, contextlib.suppress(OSError):  # ENOBUFS: the drop, reported to the sender
        sock.bind((bench.tap.name, 0))
        sock.send(Flow().udp())
    assert not bench.waits(0.05)
    state = bench.node.run("ip", "-d", "addr", "show", bench.tap.name)
    assert "inet" not in state
    assert "noqueue" in state
    assert "qlen 16384" in state


def test_a_hit_stays_behind_held_packets_but_not_for_ever(bench: HoldBench, follower: Follower) -> None:
    """It is gated while one of its address is out; past the limit a stream that never pauses leaves the detour."""
    bench.control.set_limits(HoldLimits(), 0.05)
    bench.send(Flow().udp(b"first"))
    first = bench.read()
    bench.install(POD_B1)
    bench.send(Flow().udp(b"second"))
    assert bench.slot(bench.read()).hold == Why.GATED
    assert bench.counts() == {"held": 1, "gated": 1}

    def overtakes() -> bool:
        bench.send(Flow().udp(b"third"))
        return follower.seen().with_entry == 1

    wait_until(overtakes, 2, "a packet that does not wait")
    assert time.monotonic_ns() - bench.slot(first).parked_ns >= 100_000_000


def test_a_miss_behind_others_is_parked_without_a_signal_of_its_own(
    bench: HoldBench, follower: Follower
) -> None:
    """One signal, one answer for all of them; with none out, a silent address passes."""
    bench.send(Flow().udp())
    bench.send(Flow().udp())
    first, second = bench.read(), bench.read()
    assert bench.slot(second).hold == Why.BEHIND
    bench.write(first)
    bench.write(second)
    arrivals(follower, 2)
    bench.send(Flow().udp())
    arrivals(follower, 3)
    assert bench.counts() == {"held": 2, "returned": 2}
    counts = bench.datapath.counters.read(Direction.EGRESS)
    assert (counts.missed, counts.signalled, counts.missed_again) == (3, 1, 2)
    window = bench.datapath.windows.take(POD_B1.address(4))
    assert window
    assert window.packets == 3


def test_an_entry_that_vanishes_again_is_signalled_at_once(bench: HoldBench, follower: Follower) -> None:
    """The held packet's arrival ends the silence of its address."""
    for signalled in (1, 2, 3):
        bench.send(Flow().udp())
        frame = bench.read()
        bench.install(POD_B1)
        bench.write(frame)
        arrivals(follower, signalled)
        assert bench.datapath.counters.read(Direction.EGRESS).signalled == signalled
        bench.ipcache.delete(POD_B1.address(4))
    assert follower.seen().without_entry == 0


def test_a_packet_that_returns_without_an_entry_is_dropped_if_missed_ones_are(
    bench: HoldBench, follower: Follower
) -> None:
    """The operator has said so meanwhile."""
    bench.send(Flow().udp())
    frame = bench.read()
    bench.datapath.config.change(on_miss=OnMiss.DROP)
    bench.write(frame)
    wait_until(lambda: bench.counts() == {"held": 1, "returned": 1}, 2)
    counts = bench.datapath.counters.read(Direction.EGRESS)
    assert (counts.missed_again, counts.missed_drop) == (1, 1)
    assert follower.seen().without_entry == 0


def test_the_books_balance_whatever_happens(bench: HoldBench) -> None:
    """Held + gated = returned + discarded + still out, at every quiet moment; accounts go back to zero."""
    dice = random.Random(4)
    peers, waiting = [pod_of_b(number) for number in range(20)], []
    bench.control.set_limits(HoldLimits(address_packets=4, total_bytes=8_000), 0.25)
    for step in range(600):
        bench.send(Flow(peer=dice.choice(peers)).udp(bytes(dice.randrange(400))))
        while bench.waits():
            waiting.append(os.read(bench.tap.fd, 1 << 17))
        if waiting and dice.random() < 0.6:
            give_back(bench, waiting.pop(dice.randrange(len(waiting))), dice)
        if dice.random() < 0.05:
            bench.install(dice.choice(peers))
        if step % 50 == 0:
            wait_until(lambda: balanced(bench) == bench.out() == len(waiting), 2, "balanced books")
    for frame in waiting:
        give_back(bench, frame, dice)
    wait_until(lambda: balanced(bench) == bench.out() == 0, 2, "everything back")
    assert all_free(bench)
    assert bench.settled()


def give_back(bench: HoldBench, frame: bytes, dice: random.Random) -> None:
    """Return a frame, or have it dropped."""
    if dice.random() < 0.3:
        bench.slot(frame).state = abi.SLOT_DISCARD
        frame = discarding(frame)
    bench.write(frame)


def balanced(bench: HoldBench) -> int:
    """Return how many packets should be out by the counters."""
    counts = {"held": 0, "gated": 0, "returned": 0, "discarded": 0} | bench.counts()
    return counts["held"] + counts["gated"] - counts["returned"] - counts["discarded"]


@pytest.mark.parametrize("agent", ["stops", "dies"])
def test_a_holder_touches_nothing_before_it_is_told_to_begin(agent: str, tmp_path: Path) -> None:
    """The agent starts the first one while it loads what the holder needs; if that fails, the holder ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        holder = subprocess.Popen(
            [sys.executable, "-m", "lazymesh.roles.holder", str(theirs.fileno()), str(tmp_path)],
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
        )
    with ours:
        ours.settimeout(1)
        with pytest.raises(TimeoutError):  # to open a TAP, or to miss the pins, takes it less
            ours.recv(1)
        if agent == "stops":
            ours.send(QUIT)
        else:
            ours.close()
        assert (holder.communicate(timeout=20), holder.returncode) == ((None, ""), 0)


@pytest.mark.parametrize("pins", ["there", "missing"])
def test_a_holder_whose_agent_is_dead_says_nothing(bench: HoldBench, pins: str, tmp_path: Path) -> None:
    """It was killed while its holder started, well or badly: no traceback, and no device is left."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(BEGIN)
    ours.close()
    where = bench.pins if pins == "there" else tmp_path
    command = bench.node.command(sys.executable, "-m", "lazymesh.roles.holder", str(theirs.fileno()), where)
    with theirs:
        ended = subprocess.run(
            command, pass_fds=(theirs.fileno(),), capture_output=True, text=True, timeout=20, check=False
        )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert bench.node.run("ip", "-o", "link").count("lm_hold") == 1  # the bench's own


def test_a_packet_that_never_arrives_is_found(bench: HoldBench) -> None:
    """Its interface went away meanwhile: the sweep has it uncounted, and its account is closed."""
    bench.node.ip(["link add lxc1 type veth peer name other", "link set lxc1 up", "link set other up"])
    gone = bench.node.call(socket.if_nametoindex, "lxc1")
    bench.send(Flow().udp())
    frame = bench.read()
    bench.slot(frame).ifindex = gone
    accounts = libbpf.Map.pinned(bench.pins / "lm_hold_if")
    accounts.update(gone.to_bytes(4, "little"), bytes(ctypes.sizeof(abi.Outstanding)))
    bench.node.ip(["link del lxc1"])
    with holder_at(bench) as holder:
        parked = frame_of(frame, bench.mapped.slots)
        assert parked
        now = time.monotonic()
        before = bench.mapped.stats.never_arrived
        holder._write(parked.data)
        holder._written.append((now - 2, parked.slot, bench.slot(frame).parked_ns))
        bench.node.call(holder._tidy, now)
    wait_until(lambda: bench.counts() == {"held": 1, "discarded": 1}, 2)
    assert bench.mapped.stats.never_arrived == before + 1
    assert bench.out() == 0
    bench.node.call(holder._forget_interfaces)
    assert {int.from_bytes(key, "little") for key, _ in accounts.items()} == {bench.ifindex}
    accounts.close()


@contextlib.contextmanager
def holder_at(bench: HoldBench) -> Iterator[Holder]:
    """Have a holder's loop at the TAP, to be driven step by step."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield Holder(bench.tap, bench.pins, bench.mapped, theirs)


def test_a_holder_does_as_it_is_told(bench: HoldBench, follower: Follower) -> None:
    """How long packets wait, whether they are dropped then, from when on they are parked, and where they may go."""
    words, stats = bench.mapped.control, bench.mapped.stats
    words.tap_ifindex = words.udp_gso = words.holder_beat_ns = 0
    with holder_at(bench) as holder:
        holder._obey(b"c" + json.dumps({"limit_s": 0.5, "drop_on_timeout": True}).encode())
        assert (holder._queues.limit_s, holder._queues.drop_on_timeout) == (0.5, True)
        began = time.monotonic_ns()
        holder._obey(b"g")
        assert (words.tap_ifindex, words.udp_gso) == (bench.tap.ifindex, bench.tap.udp_gso)
        assert began <= words.holder_beat_ns
        words.holder_beat_ns += 10**12  # however long the sending takes here
        peers, before = [pod_of_b(number) for number in range(3)], (stats.installed, stats.negative)
        for version in (4, 6):
            for peer in peers:
                bench.send(Flow(peer=peer, version=version).udp())
        holder._read_tap()
        now = time.monotonic()
        answers = [
            (0, b"\1" + peers[0].address(4).ljust(16, b"\0"), now),
            (1, b"\1" + peers[1].address(4).ljust(16, b"\0"), now),
            (1, b"\2" + peers[1].address(6), now),
            (0, b"\2" + peers[2].address(6), now - 60),
        ]
        holder._obey(b"a" + b"".join(ANSWER.pack(*each) for each in answers))
        arrivals(follower, 3)
        assert len(holder._queues) == 3
        assert (stats.installed - before[0], stats.negative - before[1]) == (1, 2)
        holder._obey(b"q")
        holder.run()
    arrivals(follower, 6)
    assert bench.settled()


def test_a_holder_reads_the_largest_packet_whole(bench: HoldBench) -> None:
    """A shorter read would cut it without an error."""
    bench.send_gso(Flow().tcp("A", bytes(64_000)), 1, 34, 16)
    with holder_at(bench) as holder:
        holder._read_tap()
        (back,) = holder._queues.drain()
    assert len(back.frame.data) == VNET_HEADER + 54 + 64_000


def test_what_another_holder_has_parked_is_a_stray(bench: HoldBench) -> None:
    """It has begun anew, and knows nothing of it."""
    bench.send(Flow().udp())
    before = bench.mapped.stats.strays
    for slot in bench.mapped.slots:
        slot.hold = 0
    with holder_at(bench) as holder:
        holder._read_tap()
        assert len(holder._queues) == 0
    assert bench.mapped.stats.strays == before + 1


def test_a_frame_with_a_number_that_no_slot_has_is_none(bench: HoldBench) -> None:
    """The first beyond the last one, and the highest."""
    for number in (len(bench.mapped.slots), 0xFFFF):
        frame = bytes(VNET_HEADER + 10) + number.to_bytes(2, "big") + bytes(50)
        assert frame_of(frame, bench.mapped.slots) is None


def test_a_holder_that_has_been_succeeded_leaves_parking_on(bench: HoldBench) -> None:
    """It is its successor's by then."""
    bench.mapped.control.tap_ifindex = bench.tap.ifindex + 1
    with holder_at(bench) as holder:
        holder._end()
    assert bench.mapped.control.tap_ifindex == bench.tap.ifindex + 1


def test_a_holder_that_ends_gives_back_all_that_is_in_the_ring(bench: HoldBench, follower: Follower) -> None:
    """It may be behind by thousands: what it has not read yet would go with the device."""
    limit_s = 60  # for which packets are held behind their first: sending may be slow
    bench.control.set_limits(HoldLimits(), limit_s)
    frames = [Flow(peer=pod_of_b(number)).udp() for number in range(10)]
    for number in range(2_000):
        bench.send(frames[number % 10])
    assert bench.out() == 2_000
    with holder_at(bench) as holder:
        holder._end()
    arrivals(follower, 2_000)
    assert bench.counts() == {"held": 2_000, "returned": 2_000}
    assert bench.mapped.control.tap_ifindex == 0
    assert bench.out() == 0


def test_an_old_holder_that_wakes_up_leaves_its_successors_packets_alone(
    bench: HoldBench, follower: Follower
) -> None:
    """Their slots have the numbers of those that it still has; to drop its own is to drop theirs."""
    frames = [Flow(peer=pod_of_b(number)).udp() for number in range(5)]
    with holder_at(bench) as old:
        old._queues.drop_on_timeout = True
        for frame in frames:
            bench.send(frame)
        old._read_tap()
        bench.clear()  # its successor begins
        for frame in frames:
            bench.send(frame)
        mine = [bench.read() for _ in frames]
        old._give_back(old._queues.expire(time.monotonic() + 1))
        old._sweep(time.monotonic() + 5)
    for frame in mine:
        bench.write(frame)
    arrivals(follower, 5)
    assert bench.counts() == {"held": 5, "returned": 5}
    assert bench.settled()


def test_a_holder_starts_from_nothing(bench: HoldBench) -> None:
    """Parking is off until it is switched on, and what its predecessor had, in whatever state, is lost."""
    states = [abi.SLOT_PARKED, abi.SLOT_RETURNING, abi.SLOT_DISCARD, abi.SLOT_CUT]
    for slot, state in zip(bench.mapped.slots, states, strict=False):
        slot.state = state
    before = bench.mapped.stats.lost
    reset(bench.pins, bench.mapped)
    assert bench.mapped.stats.lost == before + 4
    assert bench.mapped.control.tap_ifindex == 0
    assert all_free(bench)


def test_the_sweep_is_for_what_was_given_back_long_ago(bench: HoldBench) -> None:
    """Not for what is still on its way, nor for the next packet of a slot."""
    bench.send(Flow().udp())
    frame = bench.read()
    slot, now = bench.slot(frame), time.monotonic()
    young = (now - 0.5, slot_number(frame), slot.parked_ns)
    with holder_at(bench) as holder:
        holder._written = [(now - 2, slot_number(frame), slot.parked_ns - 1), young]
        holder._sweep(now)
        assert holder._written == [young]
    assert slot.state == abi.SLOT_PARKED


def test_what_could_not_be_written_is_found_when_it_can(bench: HoldBench) -> None:
    """The TAP was down when the packet was given back, and when it was swept: it is counted out once it is up."""
    bench.send(Flow().udp())
    frame = bench.read()
    before = bench.mapped.stats.never_arrived
    with holder_at(bench) as holder:
        parked = frame_of(frame, bench.mapped.slots)
        assert parked
        bench.node.ip([f"link set {bench.tap.name} down"])
        try:
            holder._give_back([Return(parked, Cause.INSTALLED)])
            for later in (2, 3):
                holder._sweep(time.monotonic() + later)
            assert bench.out() == 1
        finally:
            bench.node.ip([f"link set {bench.tap.name} up"])
        holder._sweep(time.monotonic() + 4)
        wait_until(lambda: bench.counts() == {"held": 1, "discarded": 1}, 2)
        holder._sweep(time.monotonic() + 5)
        assert holder._written == []
    assert bench.mapped.stats.never_arrived == before + 1
    assert bench.settled()


def test_a_holder_whose_device_is_deleted_ends_without_a_word(bench: HoldBench) -> None:
    """What it has read is given up with the device; the agent starts another."""
    tap = bench.node.call(lambda: open_tap(("lm_gone",)))
    bench.node.ip(["link del lm_gone"])
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs:
            theirs.setblocking(False)
            bench.node.call(Holder(tap, bench.pins, bench.mapped, theirs).run)
    finally:
        os.close(tap.fd)
    assert bench.mapped.control.tap_ifindex == bench.tap.ifindex
