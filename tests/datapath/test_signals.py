"""From a miss in the kernel to a signal in the event loop: its bytes, how often, what is counted when there is none."""

from __future__ import annotations

import asyncio
import errno
import select
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazymesh.core.model import Direction, Entry, EntryFlag, format_address
from lazymesh.datapath import abi
from lazymesh.datapath import signals as signals_module
from lazymesh.datapath.perfbuffer import PerfBuffer
from lazymesh.datapath.settingsmap import OnMiss
from lazymesh.datapath.signals import AT_ONCE, SignalReader
from tests.support import packets
from tests.support.etcd import eventually
from tests.support.misses import Signal, signal_of
from tests.support.packets import INTERNET, NODE_B, POD_A1, POD_B1, POD_B2, Flow, Host, pod_of_b

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lazymesh.core.model import Address
    from lazymesh.datapath.libbpf import Map
    from tests.datapath.conftest import Bench
    from tests.support.namespaces import Namespace

EGRESS, INGRESS = Direction
CAUSES = ("signalled", "suppressed_dedup", "suppressed_rate", "muted", "lost")
UNLIMITED = {"interface_rate": 0, "global_rate": 0}
HOUR_NS = 3_600 * 10**9
"""A token in this time: none comes back while a test runs, however slow the machine."""


@pytest.fixture
def mesh(bench: Bench) -> Bench:
    """Return a datapath where every pod of cluster b misses."""
    bench.mesh({packets.PODS_OF_B[4]: 2, packets.PODS_OF_B[6]: 2})
    return bench


@contextmanager
def reading(bench: Bench, pages: int = 16) -> Iterator[list[bytes]]:
    """Read raw records; they are in the list when the block ends."""
    records: list[bytes] = []
    ring = PerfBuffer(bench.datapath.signals.events, pages, records.extend)
    try:
        yield records
        ring.consume()
    finally:
        ring.close()


def signals_in(records: list[bytes]) -> list[Signal]:
    """Return the signals in order of time; rings of several CPUs are read one after the other."""
    signals = [signal_of(record) for record in records]
    assert None not in signals
    return sorted((signal for signal in signals if signal), key=lambda signal: signal.ktime_ns)


def assert_every_miss_is_accounted_for(bench: Bench) -> None:
    """Check the equation of DESIGN section 5, in both directions."""
    for direction in Direction:
        counts = bench.counts(direction)
        assert sum(counts.get(cause, 0) for cause in CAUSES) == counts.get("missed", 0), counts


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


@pytest.mark.parametrize("direction", list(Direction), ids=["egress", "ingress"])
@pytest.mark.parametrize("version", [4, 6])
def test_signal_has_the_bytes_that_the_header_says(bench: Bench, version: int, direction: Direction) -> None:
    """Signal number first, the address in network order: 10.1.0.164 arrives as 10.1.0.164."""
    bench.mesh({packets.PODS_OF_A[version]: 513})
    before = time.monotonic_ns()
    with reading(bench) as records:
        bench.send(direction, Flow(POD_A1, direction, version, pod=POD_B1).udp())
    (record,) = records

    *head, address, pad, ktime = struct.unpack_from("=IBBHI16sIQ", record)
    assert head == [3, 1 if version == 4 else 2, direction, 513, 1]
    assert address == POD_A1.address(version).ljust(16, b"\0")
    assert pad == 0
    assert before <= ktime <= time.monotonic_ns()
    assert any(record[40:]) is False
    signal = signal_of(record)
    assert signal == Signal(POD_A1.address(version), direction, 513, 1, ktime)
    assert format_address(signal.address) == ("10.1.0.164" if version == 4 else "fd00:1::a4")


def test_cluster_of_the_longest_mesh_cidr_is_named(mesh: Bench) -> None:
    """A narrower CIDR of another cluster wins, one that two clusters claim (0) too."""
    mesh.mesh({"10.2.7.0/24": 3, "10.2.128.0/17": 0})
    with reading(mesh) as records:
        for peer in (POD_B1, POD_B2, pod_of_b(1)):
            mesh.send(EGRESS, Flow(peer).udp())
    assert [signal.cluster_id for signal in signals_in(records)] == [2, 3, 0]


def test_miss_outside_the_mesh_names_no_cluster(bench: Bench) -> None:
    """A pod CIDR entry with a tunnel endpoint is a miss though we have no CIDR for it: cluster 0."""
    tunnelled = Entry(2, NODE_B.address(4), 0, EntryFlag.HAS_TUNNEL_EP)
    bench.entries({packets.NODE_PODS_OF_B[4]: tunnelled})
    with reading(bench) as records:
        bench.send(EGRESS, Flow().udp())
    assert [signal.cluster_id for signal in signals_in(records)] == [0]


def test_address_is_signalled_once_and_again_after_its_interval(mesh: Bench) -> None:
    """A hundred packets are one question; a packet after the re-arm interval asks again."""
    mesh.configure(rearm_s=0.1)
    with reading(mesh) as records:
        mesh.send(EGRESS, Flow().udp(), repeat=100)
        assert mesh.counts(EGRESS) == {"missed": 100, "signalled": 1, "suppressed_dedup": 99}

        def asked_again() -> bool:
            mesh.send(EGRESS, Flow().udp())
            return mesh.counts(EGRESS)["signalled"] == 2

        wait_for(asked_again)
    first, second = (signal.ktime_ns for signal in signals_in(records))
    assert second - first >= 100_000_000
    assert_every_miss_is_accounted_for(mesh)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 60.0, 3_600.0])
def test_interval_is_lengthened_by_chance_up_to_a_quarter(mesh: Bench, seconds: float) -> None:
    """Addresses that miss together do not miss together again."""
    mesh.configure(rearm_s=seconds, **UNLIMITED)
    before = time.monotonic_ns()
    with reading(mesh):
        for number in range(64):
            mesh.send(EGRESS, Flow(pod_of_b(number)).udp())
    after = time.monotonic_ns()
    silent_until = [int.from_bytes(value, "little") for _, value in mesh.maps["lm_dedup"].items()]
    assert len(silent_until) == 64
    assert min(silent_until) >= before + seconds * 1e9 * 0.999
    assert max(silent_until) <= after + seconds * 1.25e9
    assert max(silent_until) - min(silent_until) > seconds * 1e9 / 10


def test_address_that_misses_both_ways_is_signalled_once(mesh: Bench) -> None:
    """Who it belongs to does not depend on the direction."""
    with reading(mesh) as records:
        mesh.send(EGRESS, Flow().udp())
        mesh.send(INGRESS, Flow(direction=INGRESS).udp())
    assert len(records) == 1
    assert mesh.counts(INGRESS) == {"missed": 1, "suppressed_dedup": 1}


def test_families_do_not_share_an_interval(bench: Bench) -> None:
    """An IPv6 address that starts with the bytes of an IPv4 one is another address."""
    twin = Host("a twin", "10.2.0.5", "a02:5::")
    bench.mesh({packets.WORLD[4]: 2, packets.WORLD[6]: 2})
    with reading(bench) as records:
        for version in (4, 6):
            bench.send(EGRESS, Flow(twin, version=version).udp())
    assert len(records) == 2


@pytest.fixture
def two_ports(node: Namespace) -> tuple[Namespace, int, int]:
    """Return a namespace and the indexes of two devices in it."""
    node.ip(["link add one index 101 type veth peer name two index 102"])
    return node, 101, 102


def send_to_many(bench: Bench, ifindex: int, numbers: range) -> None:
    """Send a packet to each of these pods of cluster b, from one interface."""
    for number in numbers:
        bench.send(EGRESS, Flow(pod_of_b(number)).udp(), ifindex=ifindex)


def test_noisy_interface_uses_up_its_own_tokens_only(
    mesh: Bench, two_ports: tuple[Namespace, int, int]
) -> None:
    """A pod that scans the mesh is cut off at its burst; its neighbour's first misses are signalled."""
    node, one, two = two_ports
    mesh.configure(interface_rate=1, interface_burst=10, global_rate=0)
    mesh.datapath.config.change(interface_interval_ns=HOUR_NS, interface_burst_ns=9 * HOUR_NS)
    with reading(mesh) as records:
        node.call(send_to_many, mesh, one, range(50))
        assert mesh.counts(EGRESS) == {"missed": 50, "signalled": 10, "suppressed_rate": 40}
        node.call(send_to_many, mesh, two, range(50, 58))
        assert mesh.counts(EGRESS) == {"missed": 58, "signalled": 18, "suppressed_rate": 40}
    assert [signal.ifindex for signal in signals_in(records)] == [one] * 10 + [two] * 8


def test_all_interfaces_together_keep_the_global_limit(
    mesh: Bench, two_ports: tuple[Namespace, int, int]
) -> None:
    """However many interfaces there are, the agent gets no more than it can take."""
    node, one, two = two_ports
    mesh.configure(interface_rate=0, global_rate=1, global_burst=15)
    mesh.datapath.config.change(global_interval_ns=HOUR_NS, global_burst_ns=14 * HOUR_NS)
    with reading(mesh) as records:
        node.call(send_to_many, mesh, one, range(10))
        node.call(send_to_many, mesh, two, range(10, 30))
    assert len(records) == 15
    assert mesh.counts(EGRESS) == {"missed": 30, "signalled": 15, "suppressed_rate": 15}


def test_address_that_found_no_token_is_not_silenced(mesh: Bench) -> None:
    """Its next packet asks as soon as there is a token, long before the re-arm interval is over."""
    mesh.configure(rearm_s=60, interface_rate=5, interface_burst=1, global_rate=0)
    with reading(mesh) as records:
        mesh.send(EGRESS, Flow(pod_of_b(1)).udp())
        mesh.send(EGRESS, Flow(pod_of_b(2)).udp())
        assert mesh.counts(EGRESS) == {"missed": 2, "signalled": 1, "suppressed_rate": 1}

        def signalled() -> bool:
            mesh.send(EGRESS, Flow(pod_of_b(2)).udp())
            return mesh.counts(EGRESS)["signalled"] == 2

        wait_for(signalled)
    assert len(records) == 2
    assert_every_miss_is_accounted_for(mesh)


def test_tokens_come_back_at_the_rate_that_was_set(mesh: Bench) -> None:
    """A bucket of 1,000 per second is full again a few milliseconds later, and lets no more through than it says."""
    mesh.configure(rearm_s=0, interface_rate=1_000, interface_burst=5, global_rate=0)
    frame = Flow().udp()
    with reading(mesh):
        start = time.monotonic()
        for _ in range(10):
            before = mesh.counts(EGRESS).get("signalled", 0)
            mesh.send(EGRESS, frame, repeat=5)
            assert mesh.counts(EGRESS)["signalled"] == before + 5, "the whole burst"
            mesh.send(EGRESS, frame, repeat=100)
            time.sleep(0.006)
        seconds = time.monotonic() - start
    assert mesh.counts(EGRESS)["signalled"] <= 5 + seconds * 1_000 + 1
    assert_every_miss_is_accounted_for(mesh)


def test_a_share_of_the_rates_is_admitted_and_of_a_burst_as_well(mesh: Bench) -> None:
    """Half of the tokens at once, and half as often; new settings admit everything."""
    mesh.configure(rearm_s=0, interface_rate=10, interface_burst=101, global_rate=0)
    with reading(mesh):
        mesh.datapath.config.admit(0.5)
        mesh.send(EGRESS, Flow().udp(), repeat=200)
        half = mesh.counts(EGRESS)["signalled"]
        assert 50 <= half <= 53
        time.sleep(0.65)
        mesh.send(EGRESS, Flow().udp(), repeat=200)
        assert 3 <= mesh.counts(EGRESS)["signalled"] - half <= 20
        mesh.configure(rearm_s=0, interface_rate=10, interface_burst=101, global_rate=0)
        assert mesh.datapath.config.read().interface_interval_ns == 100_000_000
    assert_every_miss_is_accounted_for(mesh)


def test_a_rate_without_limit_stays_so(mesh: Bench) -> None:
    """A share of no limit is not a number."""
    mesh.configure(rearm_s=0, interface_rate=0, global_rate=0)
    mesh.datapath.config.admit(0.1)
    with reading(mesh):
        mesh.send(EGRESS, Flow().udp(), repeat=50)
    assert mesh.counts(EGRESS)["signalled"] == 50


def test_muted_program_counts_and_is_silent(mesh: Bench) -> None:
    """The flag stops signals at once; when it goes down nothing is left of it, not even an interval."""
    with reading(mesh) as records:
        mesh.datapath.config.mute(True)
        mesh.send(EGRESS, Flow().udp(), repeat=10)
        assert mesh.counts(EGRESS) == {"missed": 10, "muted": 10}
        mesh.datapath.config.mute(False)
        mesh.send(EGRESS, Flow().udp())
    assert len(records) == 1
    assert mesh.counts(EGRESS) == {"missed": 11, "muted": 10, "signalled": 1}


def test_mute_changes_no_other_setting_and_new_settings_end_it(mesh: Bench) -> None:
    """Overload must not switch a policy off, and a fresh start must not stay deaf."""
    mesh.configure(rearm_s=7, on_miss=OnMiss.DROP, enforced=frozenset(Direction))
    before = bytes(mesh.datapath.config.read())
    mesh.datapath.config.mute(True)
    assert mesh.datapath.config.read().muted == 1
    mesh.datapath.config.mute(False)
    assert bytes(mesh.datapath.config.read()) == before
    mesh.datapath.config.mute(True)
    mesh.configure()
    assert mesh.datapath.config.read().muted == 0


def test_signal_without_a_reader_is_lost_and_asked_again(mesh: Bench) -> None:
    """A dead agent arms no interval: the first packet after its restart is signalled."""
    mesh.send(EGRESS, Flow().udp(), repeat=3)
    assert mesh.counts(EGRESS) == {"missed": 3, "lost": 3}
    with reading(mesh) as records:
        mesh.send(EGRESS, Flow().udp())
    assert len(records) == 1
    assert mesh.counts(EGRESS) == {"missed": 4, "lost": 3, "signalled": 1}


def test_full_ring_loses_signals_by_count(mesh: Bench) -> None:
    """What does not fit is counted in the kernel, and what is signalled is read: nothing in between."""
    mesh.configure(**UNLIMITED)
    with reading(mesh, pages=1) as records:
        send_to_many(mesh, 0, range(1_000))
    counts = mesh.counts(EGRESS)
    assert counts["lost"] > 0
    assert counts["signalled"] == len(records) > 0
    assert_every_miss_is_accounted_for(mesh)


def test_dropped_misses_are_signalled_like_any(mesh: Bench) -> None:
    """Otherwise a dropped peer would stay dropped forever."""
    mesh.configure(on_miss=OnMiss.DROP)
    with reading(mesh) as records:
        mesh.send(EGRESS, Flow().udp())
    assert len(records) == 1


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("peer", [INTERNET, POD_B1], ids=["the internet", "a synced peer"])
def test_a_quarter_million_packets_raise_no_signal(mesh: Bench, peer: Host, version: int) -> None:
    """One million in all: what is not a miss never wakes the agent, however much of it there is."""
    mesh.entries({packets.WORLD[version]: Entry(2), POD_B1.prefix(version): Entry(131_073)})
    with reading(mesh) as records:
        mesh.send(EGRESS, Flow(peer, version=version).udp(), repeat=250_000)
    assert records == []
    assert mesh.counts(EGRESS) == {"hit" if peer is POD_B1 else "not_mesh": 250_000}


async def test_reader_receives_exactly_what_was_signalled(mesh: Bench) -> None:
    """Through the event loop, in batches, with nothing added and nothing left behind."""
    mesh.configure(**UNLIMITED)
    batches: list[list[Address]] = []
    reader = SignalReader(mesh.datapath.signals, lambda signals: batches.append(signals.addresses))
    mesh.send(EGRESS, Flow(pod_of_b(999)).udp())  # before the loop looks
    reader.start()
    try:
        for start in range(0, 400, 40):
            await asyncio.to_thread(send_to_many, mesh, 0, range(start, start + 40))
        await asyncio.to_thread(wait_for, lambda: sum(map(len, batches)) >= 401)
    finally:
        reader.close()
    expected = {pod_of_b(number).address(4) for number in (999, *range(400))}
    assert {address for batch in batches for address in batch} == expected
    assert sum(map(len, batches)) == mesh.counts(EGRESS)["signalled"] == 401
    assert reader.invalid == 0
    assert all(batches)


@pytest.fixture
def rest_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a reader wait this long after several signals."""
    monkeypatch.setattr(signals_module, "EACH_S", 1.0)
    monkeypatch.setattr(signals_module, "REST_S", 1.0)


def want_wake(bench: Bench, wake: int) -> None:
    """Say, in a reader's place, whether the next signal is to wake it."""
    bench.datapath.signals.reader.update(bytes(4), bytes(abi.Reader(wake=wake)))


def is_readable(ring: PerfBuffer) -> bool:
    """Return whether an event loop would look at it now."""
    readiness = select.poll()  # select() takes no descriptor above 1,023
    readiness.register(ring.fd, select.POLLIN)
    return bool(readiness.poll(0))


@pytest.mark.parametrize("wakes", [True, False])
def test_ring_wakes_its_reader_at_each_record_or_when_half_full(mesh: Bench, wakes: bool) -> None:
    """A page holds 73 signals."""
    mesh.configure(**UNLIMITED)
    ring = PerfBuffer(mesh.datapath.signals.events, 1, lambda _: None, wakes=wakes)
    try:
        mesh.send(EGRESS, Flow(pod_of_b(0)).udp())
        assert is_readable(ring) == wakes
        for number in range(1, 60):
            mesh.send(EGRESS, Flow(pod_of_b(number)).udp())
        assert is_readable(ring)
    finally:
        ring.close()


def test_doorbell_rings_once_for_a_reader_that_wants_to_be_woken(mesh: Bench) -> None:
    """It does not ring for one that is at work, nor for a packet that is not signalled."""
    mesh.configure(**UNLIMITED)
    rung: list[bytes] = []
    ring = PerfBuffer(mesh.datapath.signals.doorbell, 1, rung.extend, wakes=True)

    def rings(numbers: range) -> int:
        before = len(rung)
        for number in numbers:
            mesh.send(EGRESS, Flow(pod_of_b(number)).udp())
        readable = is_readable(ring)
        ring.consume()
        assert readable == (len(rung) > before)
        return len(rung) - before

    try:
        with reading(mesh) as signals:
            want_wake(mesh, 0)
            assert rings(range(3)) == 0
            want_wake(mesh, 1)
            assert rings(range(3)) == 0  # none is signalled: all three were a moment ago
            assert rings(range(3, 6)) == 1
            assert rings(range(6, 9)) == 0
        assert len(signals) == 9
    finally:
        ring.close()


def test_doorbell_that_nobody_hears_rings_for_the_next_reader(mesh: Bench) -> None:
    """The wish to be woken is not used up by a signal that could not wake anybody."""
    mesh.configure(**UNLIMITED)
    rung: list[bytes] = []
    want_wake(mesh, 1)
    with reading(mesh):
        mesh.send(EGRESS, Flow(pod_of_b(0)).udp())
        ring = PerfBuffer(mesh.datapath.signals.doorbell, 1, rung.extend, wakes=True)
        mesh.send(EGRESS, Flow(pod_of_b(1)).udp())
        ring.consume()
        ring.close()
    assert len(rung) == 1


async def test_signal_sent_after_the_reader_has_looked_wakes_it(mesh: Bench) -> None:
    """No other is needed for that, however often it happens: the doorbell's own rings, a page each, never fill up."""
    mesh.configure(**UNLIMITED)
    received: list[Address] = []
    many = 700

    def receive(signals: abi.Signals) -> None:
        received.extend(signals.addresses)
        if len(received) < many:
            mesh.send(EGRESS, Flow(pod_of_b(len(received))).udp())

    reader = SignalReader(mesh.datapath.signals, receive)
    reader.start()
    mesh.send(EGRESS, Flow(pod_of_b(0)).udp())
    try:
        await eventually(lambda: len(received) == many, 60)  # the processor may be emulated
    finally:
        reader.close()
    assert len(set(received)) == mesh.counts(EGRESS)["signalled"] == many


@pytest.mark.usefixtures("rest_of_a_second")
async def test_signals_that_follow_several_wait_a_moment_and_come_together(
    mesh: Bench,
) -> None:
    """What follows a lone one does not wait; in a flood many share a wake-up, and nothing else waits for them."""
    mesh.configure(**UNLIMITED)
    batches: list[int] = []
    reader = SignalReader(mesh.datapath.signals, lambda signals: batches.append(len(signals.addresses)))
    reader.start()

    async def sent(first: int, count: int) -> float:
        began, before = time.monotonic(), len(batches)
        send_to_many(mesh, 0, range(first, first + count))
        await eventually(lambda: len(batches) > before)
        return time.monotonic() - began

    try:
        at_once = [await sent(number, 1) for number in range(3)] + [await sent(10, 2)]
        late = await sent(20, 5)
        reader.pause(True)
        send_to_many(mesh, 0, range(30, 37))
        reader.pause(False)
        await eventually(lambda: len(batches) == 6)
    finally:
        reader.close()
    assert batches == [1, 1, 1, 2, 5, 7]
    assert max(at_once) < 0.9 < late


@pytest.mark.usefixtures("rest_of_a_second")
async def test_signal_that_rings_while_several_are_handed_over_waits_for_others(
    mesh: Bench,
) -> None:
    """The doorbell does not end the wait that several are followed by: in a flood it would ring in each of them."""
    mesh.configure(**UNLIMITED)
    batches: list[int] = []

    def receive(signals: abi.Signals) -> None:
        batches.append(len(signals.addresses))
        if len(batches) == 1:
            send_to_many(mesh, 0, range(5, 8))

    reader = SignalReader(mesh.datapath.signals, receive)
    send_to_many(mesh, 0, range(10, 15))
    began = time.monotonic()
    reader.start()
    try:
        await eventually(lambda: len(batches) == 2)
    finally:
        reader.close()
    assert batches == [5, 3]
    assert time.monotonic() - began > 0.9


async def test_signal_that_wakes_nobody_is_found_by_a_look(mesh: Bench) -> None:
    """Processors whose memory is less orderly than x86 may lose a wish to be woken."""
    mesh.configure(**UNLIMITED)
    received: list[Address] = []
    reader = SignalReader(mesh.datapath.signals, lambda signals: received.extend(signals.addresses))
    reader.start()
    try:
        want_wake(mesh, 0)
        mesh.send(EGRESS, Flow().udp())
        await asyncio.sleep(0.05)
        assert received == []
        reader.look()
        assert received == [POD_B1.address(4)]
        mesh.send(EGRESS, Flow(POD_B2).udp())
        await eventually(lambda: len(received) == 2)
    finally:
        reader.close()


async def test_reader_makes_do_with_the_memory_that_it_may_lock(
    mesh: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not allow the large rings, smaller ones do; closing twice does no harm."""
    asked: list[int] = []

    class Limited(PerfBuffer):
        def __init__(self, events: Map, pages: int, *rest: Any, **more: Any) -> None:
            asked.append(pages)
            if pages == signals_module.RING_PAGES:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            super().__init__(events, pages, *rest, **more)

    monkeypatch.setattr(signals_module, "PerfBuffer", Limited)
    mesh.configure(**UNLIMITED)
    received: list[Address] = []
    reader = SignalReader(mesh.datapath.signals, lambda signals: received.extend(signals.addresses))
    reader.start()
    send_to_many(mesh, 0, range(100))
    await eventually(lambda: len(received) == 100)
    reader.close()
    reader.close()
    assert asked == [1, signals_module.RING_PAGES, signals_module.FEW_PAGES]
    assert mesh.counts(EGRESS)["signalled"] == 100


async def test_closed_reader_leaves_the_kernel_without_one(mesh: Bench) -> None:
    """Signals after it count as lost, and a second reader takes over where it stopped."""
    received: list[Address] = []
    receive = lambda signals: received.extend(signals.addresses)  # noqa: E731
    for expected in ("signalled", "lost", "signalled"):
        mesh.forget_counts()
        mesh.maps["lm_dedup"].delete_many([key for key, _ in mesh.maps["lm_dedup"].items()])
        reader = SignalReader(mesh.datapath.signals, receive) if expected == "signalled" else None
        if reader:
            reader.start()
        mesh.send(EGRESS, Flow().udp())
        await asyncio.sleep(0.01)
        if reader:
            reader.close()
        assert mesh.counts(EGRESS) == {"missed": 1, expected: 1}
    assert len(received) == 2


def test_record_that_is_no_signal_is_told_apart() -> None:
    """Too short, another number, another family or direction: ignored; those beside it are read."""
    address = POD_B1.address(4)
    good = struct.pack("=IBBHI16sIQ", 3, 1, 0, 2, 7, address, 0, 5)
    for bad in (
        good[:-1],
        b"",
        b"\x02" + good[1:],
        good[:4] + b"\x03" + good[5:],
        good[:5] + b"\x02" + good[6:],
    ):
        read = abi.unpack_signals([good, bad, good + bytes(4)])
        assert read == abi.Signals([address] * 2, [5, 5], 0)


@pytest.mark.parametrize("count", [1, 20])
def test_many_signals_are_read_as_each_is(count: int) -> None:
    """Whether they are all alike or not: in number, family, direction and length."""
    v4, v6 = POD_B1.address(4), POD_B1.address(6)

    def record(number: int, family: int, direction: int, address: Address, at: int) -> bytes:
        return struct.pack("=IBBHI16sIQ", number, family, direction, 2, 7, address, 0, at) + bytes(4)

    alike = [record(3, 1, at % 2, v4, at) for at in range(count)]
    times, inward = list(range(count)), count // 2
    assert abi.unpack_signals(alike) == abi.Signals([v4] * count, times, inward)
    another = abi.unpack_signals([*alike, record(3, 2, 1, v6, 99)])
    assert another == abi.Signals([v4] * count + [v6], [*times, 99], inward + 1)
    for bad in (record(2, 1, 0, v4, 99), record(3, 3, 0, v4, 99), record(3, 1, 2, v4, 99), alike[0][:-8]):
        assert abi.unpack_signals([*alike, bad]) == abi.Signals([v4] * count, times, inward)


def test_two_processors_count_every_miss(mesh: Bench) -> None:
    """The equation holds exactly when both CPUs miss the same addresses at the same time."""
    mesh.configure(rearm_s=0.0001, interface_rate=50_000, global_rate=60_000)
    frames = [Flow(pod_of_b(number)).udp() for number in range(4)]

    def flood() -> None:
        for frame in frames * 25:
            mesh.send(EGRESS, frame, repeat=200)

    with reading(mesh, pages=256) as records:
        threads = [threading.Thread(target=flood) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert mesh.counts(EGRESS)["missed"] == 2 * 100 * 200
    assert mesh.counts(EGRESS)["signalled"] == len(records)
    assert_every_miss_is_accounted_for(mesh)


@dataclass(frozen=True)
class Send:
    """A burst of packets of one peer."""

    number: int
    direction: Direction
    version: int
    repeat: int


@dataclass(frozen=True)
class Configure:
    """New settings."""

    rearm_s: float
    interface_rate: int
    interface_burst: int
    global_rate: int
    global_burst: int
    on_miss: OnMiss


@dataclass(frozen=True)
class Mute:
    """The flag goes up or down."""

    on: bool


@dataclass(frozen=True)
class Reader:
    """A reader comes, or goes."""

    here: bool


STEPS = st.one_of(
    st.builds(
        Send,
        st.integers(0, 5),
        st.sampled_from(list(Direction)),
        st.sampled_from([4, 6]),
        st.sampled_from([1, 2, 50, 400]),
    ),
    st.builds(
        Configure,
        st.sampled_from([0.0, 0.0005, 1.0]),
        st.sampled_from([0, 1, 2_000]),
        st.integers(1, 20),
        st.sampled_from([0, 1, 2_000]),
        st.integers(1, 20),
        st.booleans(),
    ),
    st.builds(Mute, st.booleans()),
    st.builds(Reader, st.booleans()),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=30))
def test_every_miss_is_counted_by_exactly_one_cause(shared_bench: Bench, steps: list[object]) -> None:
    """Whatever happens in whatever order, the causes add up to the misses, and signalled is what readers read."""
    bench = shared_bench
    bench.wipe()
    bench.mesh({packets.PODS_OF_B[4]: 2, packets.PODS_OF_B[6]: 2})
    records: list[bytes] = []
    ring: PerfBuffer | None = None
    sent = 0
    for step in steps:
        match step:
            case Send(number, direction, version, repeat):
                bench.send(direction, Flow(pod_of_b(number), direction, version).udp(), repeat=repeat)
                sent += repeat
            case Configure():
                bench.configure(**vars(step))
            case Mute(on):
                bench.datapath.config.mute(on)
            case Reader(here):
                if ring:
                    ring.consume()
                    ring.close()
                ring = PerfBuffer(bench.datapath.signals.events, 1, records.extend) if here else None
    if ring:
        ring.consume()
        ring.close()
    assert_every_miss_is_accounted_for(bench)
    counts = [bench.counts(direction) for direction in Direction]
    assert sum(count.get("missed", 0) for count in counts) == sent
    assert sum(count.get("signalled", 0) for count in counts) == len(records)


async def test_storm_is_taken_in_parts_and_nothing_of_it_is_lost(mesh: Bench) -> None:
    """The event loop gets its turn in between; one wake-up is enough for all parts."""
    mesh.configure(**UNLIMITED)
    parts: list[int] = []
    for number in range(AT_ONCE + 10):
        mesh.send(EGRESS, Flow(pod_of_b(number)).udp())
    reader = SignalReader(mesh.datapath.signals, lambda signals: parts.append(len(signals.addresses)))
    for number in range(AT_ONCE + 10):
        mesh.send(EGRESS, Flow(pod_of_b(10_000 + number)).udp())
    reader.start()
    await eventually(lambda: sum(parts) == AT_ONCE + 10)
    reader.close()
    assert sum(parts) == mesh.counts(EGRESS)["signalled"] == AT_ONCE + 10
    assert max(parts) <= AT_ONCE
    assert_every_miss_is_accounted_for(mesh)


async def test_paused_reader_keeps_signals(mesh: Bench) -> None:
    """And hands them over when it resumes, with no new one to wake it."""
    mesh.configure(**UNLIMITED)
    received: list[Address] = []
    receive = lambda signals: received.extend(signals.addresses)  # noqa: E731
    reader = SignalReader(mesh.datapath.signals, receive)
    reader.start()
    reader.pause(True)
    for number in range(20):
        mesh.send(EGRESS, Flow(pod_of_b(number)).udp())
    await asyncio.sleep(0.05)
    assert received == []
    reader.pause(False)
    await eventually(lambda: len(received) == 20)
    reader.close()
    assert sorted(received) == sorted(pod_of_b(n).address(4) for n in range(20))


async def test_reader_keeps_so_many_and_says_so(mesh: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crowded at three quarters of its room, relieved at a quarter; what finds no room stays in the rings."""
    for name, value in (("ROOM", 40), ("CROWDED", 30), ("RELIEVED", 10), ("AT_ONCE", 8)):
        monkeypatch.setattr(signals_module, name, value)
    mesh.configure(**UNLIMITED)
    received: list[Address] = []
    receive = lambda signals: received.extend(signals.addresses)  # noqa: E731
    told: list[tuple[bool, int]] = []
    reader = SignalReader(mesh.datapath.signals, receive, lambda on: told.append((on, len(received))))
    reader.start()
    reader.pause(True)
    for number in range(60):
        mesh.send(EGRESS, Flow(pod_of_b(number)).udp())
    await eventually(lambda: told)
    assert (told, received, reader.crowded) == ([(True, 0)], [], True)
    reader.pause(False)
    await eventually(lambda: len(received) == 60)
    reader.close()
    assert [on for on, _ in told] == [True, False]
    assert 50 <= told[1][1] <= 60
    assert_every_miss_is_accounted_for(mesh)


def test_ring_is_read_across_its_end_again_and_again(mesh: Bench) -> None:
    """A page holds 73 signals: every record is whole, also those that end at the ring's beginning."""
    mesh.configure(**UNLIMITED)
    records: list[bytes] = []
    ring = PerfBuffer(mesh.datapath.signals.events, 1, records.extend)
    sent = 0
    for count in (50, 40, 1, 60, 33, 70, 7):
        for _ in range(count):
            mesh.send(EGRESS, Flow(pod_of_b(sent)).udp())
            sent += 1
        while ring.consume(7):
            pass
    ring.close()
    assert [signal.address for signal in signals_in(records)] == [pod_of_b(n).address(4) for n in range(sent)]
