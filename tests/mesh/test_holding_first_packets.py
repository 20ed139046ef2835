"""Held first packets: every one arrives, once, in order, and nobody's SYN is sent twice."""

from __future__ import annotations

import itertools
import socket
import time
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath.libbpf import Map
from tests.support.burst import Sink, counters, numbered, send
from tests.support.etcd import wait_until
from tests.support.lab import ETCD_PORT, SERVER_IDENTITY, AgentProcess, Lab, remote_address
from tests.support.node import identity_of, launched, metric, options, packets, status
from tests.support.proxy import Proxy
from tests.support.traffic import PORT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.namespaces import Namespace

PROXY_PORT = 12_379

_numbers = itertools.count(1_000)


def fresh(count: int, family: int = 4) -> list[str]:
    """Return addresses of remote pods that no test has used yet."""
    return [remote_address(number, family) for number in itertools.islice(_numbers, count)]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab for all of them."""
    with Lab(pods=2) as built:
        yield built


@pytest.fixture(scope="module")
def proxy(lab: Lab) -> Iterator[Proxy]:
    """Return what stands between the agent and its etcd; it delays nothing unless told."""
    with Proxy(lab.node_a, PROXY_PORT, ETCD_PORT) as between:
        yield between


@pytest.fixture(scope="module")
def agent(lab: Lab, proxy: Proxy) -> Iterator[AgentProcess]:
    """Return an agent that holds, enforces nothing, and reaches etcd through the proxy."""
    config = lab.directory / "proxied"
    config.mkdir()
    url = lab.etcd.url.replace(str(ETCD_PORT), str(PROXY_PORT))
    (config / "b").write_text(f"endpoints:\n- {url}\n", encoding="ascii")
    words = options(lab, clustermesh_config=str(config), policy=None)
    with launched(lab, *words, "--on-miss", "hold") as running:
        running.wait_ready()
        yield running


@pytest.fixture(autouse=True)
def books_balance(lab: Lab, agent: AgentProcess, proxy: Proxy) -> Iterator[None]:
    """Before every test the pods' shares of signals are whole; after it nothing is out, and the counters add up."""
    rate = Map.pinned(lab.bpffs / "lazymesh" / "lm_rate")
    rate.delete_many([key for key, _ in rate.items()])
    rate.close()
    yield
    proxy.delay(0)
    wait_until(lambda: out(agent) == 0, 3, "everything given back")


def held(agent: AgentProcess, outcome: str = "held") -> int:
    """Return a counter of the kernel's about holding."""
    return int(metric(agent, "lazymesh_held_packets_total", outcome=outcome))


def released(agent: AgentProcess, reason: str) -> int:
    """Return why packets were given back."""
    return int(metric(agent, "lazymesh_released_packets_total", reason=reason))


def out(agent: AgentProcess) -> int:
    """Return how many packets are out, by the counters."""
    came, went = ("held", "gated"), ("returned", "discarded")
    return sum(held(agent, outcome) for outcome in came) - sum(held(agent, outcome) for outcome in went)


def connect_all(namespace: Namespace, addresses: list[str]) -> list[float]:
    """Connect to one after the other; return milliseconds."""

    def run() -> list[float]:
        took = []
        for address in addresses:
            began = time.perf_counter()
            socket.create_connection((address, PORT), timeout=5).close()
            took.append((time.perf_counter() - began) * 1_000)
        return took

    return namespace.call(run)


def say(record: Callable[[str, object], None], name: str, first: list[float], warm: list[float]) -> None:
    """Print and record the figures."""
    for kind, values in (("first", first), ("warm", warm)):
        ordered = sorted(values)
        p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
        print(f"{name} {kind}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {ordered[-1]:.2f} ms")
        record(f"{name} {kind} p50 p99 ms", (round(p50, 3), round(p99, 3)))


@pytest.mark.parametrize("family", [4, 6])
def test_a_thousand_first_connections_lose_no_syn(
    lab: Lab, agent: AgentProcess, family: int, record_property: Callable[[str, object], None]
) -> None:
    """A SYN that has to be sent again costs a second; none is."""
    addresses = fresh(1_000 if family == 4 else 300, family)
    lab.publish_many(addresses)
    pod = lab.pods[0].namespace
    before, was_held = counters(pod)["TcpExt.TCPSynRetrans"], held(agent)
    first = connect_all(pod, addresses)
    warm = connect_all(pod, addresses)
    say(record_property, f"IPv{family}", first, warm)
    assert counters(pod)["TcpExt.TCPSynRetrans"] == before
    assert held(agent) - was_held == len(addresses)
    assert sorted(first)[len(first) // 2] < sorted(warm)[len(warm) // 2] + 50


def test_a_slow_store_costs_its_delay_and_no_syn(
    lab: Lab, agent: AgentProcess, proxy: Proxy, record_property: Callable[[str, object], None]
) -> None:
    """Etcd answers 50 ms later; so does the first connection, and not a retransmission later."""
    addresses = fresh(40)
    lab.publish_many(addresses)
    pod = lab.pods[0].namespace
    before = counters(pod)["TcpExt.TCPSynRetrans"]
    proxy.delay(0.05)
    first = connect_all(pod, addresses)
    say(record_property, "50 ms", first, connect_all(pod, addresses))
    assert counters(pod)["TcpExt.TCPSynRetrans"] == before
    assert min(first) >= 50
    assert sorted(first)[len(first) // 2] < 150


@pytest.mark.parametrize("delay_s", [0, 0.05])
@pytest.mark.parametrize("family", [4, 6])
def test_datagrams_arrive_once_and_in_order(
    lab: Lab, agent: AgentProcess, proxy: Proxy, family: int, delay_s: float
) -> None:
    """Ten to each of 300 addresses, back to back."""
    addresses = fresh(300, family)
    lab.publish_many(addresses)
    proxy.delay(delay_s)
    was_held = held(agent)
    with Sink(lab.node_b, family) as sink:
        send(lab.pods[0].namespace, addresses, 10)
        sink.wait(3_000)
        assert sink.by_address() == dict.fromkeys(addresses, numbered(10))
    assert held(agent) - was_held >= 300


@pytest.mark.parametrize("family", [4, 6])
def test_fragments_are_held_together(lab: Lab, agent: AgentProcess, proxy: Proxy, family: int) -> None:
    """Datagrams of 3,000 bytes in pieces: all of them, in order."""
    addresses = fresh(50, family)
    lab.publish_many(addresses)
    proxy.delay(0.02)
    with Sink(lab.node_b, family) as sink:
        send(lab.pods[0].namespace, addresses, 5, 3_000)
        sink.wait(250)
        assert sink.by_address() == dict.fromkeys(addresses, numbered(5, 3_000))


@pytest.mark.parametrize("family", [4, 6])
def test_udp_segments_are_held_as_one(lab: Lab, agent: AgentProcess, proxy: Proxy, family: int) -> None:
    """UDP GSO: ten datagrams handed over at once, one packet held, ten arrive."""
    addresses = fresh(100, family)
    lab.publish_many(addresses)
    proxy.delay(0.02)
    was_held = held(agent)
    with Sink(lab.node_b, family) as sink:
        send(lab.pods[0].namespace, addresses, 10, gso=1_200)
        sink.wait(1_000)
        assert sink.by_address() == dict.fromkeys(addresses, numbered(10, 1_200))
    assert held(agent) - was_held == 100


@pytest.mark.parametrize("family", [4, 6])
def test_sources_are_held_at_the_uplink(lab: Lab, agent: AgentProcess, family: int) -> None:
    """A remote pod speaks first: its packets wait at the node's border for its identity."""
    sources = fresh(100, family)
    lab.publish_many(sources)
    before = packets(agent, "signalled", "ingress")
    was_held = held(agent)
    pod = lab.pods[0]
    target = pod.ipv6 if family == 6 else pod.ipv4
    with Sink(pod.namespace, family) as sink:

        def speak() -> None:
            kind = socket.AF_INET6 if family == 6 else socket.AF_INET
            for source in sources:
                with socket.socket(kind, socket.SOCK_DGRAM) as sock:
                    sock.setsockopt(
                        *((41, 78, 1) if family == 6 else (0, 15, 1))
                    )  # may bind to what is not here
                    sock.bind((source, 0))
                    for data in numbered(3):
                        sock.sendto(data, (target, 9_009))

        lab.node_b.call(speak)
        assert len(sink.wait(300)) == 300
    assert packets(agent, "signalled", "ingress") - before == 100
    assert held(agent) - was_held >= 100
    assert identity_of(lab, sources[0]) == SERVER_IDENTITY


def test_a_negative_answer_releases_at_once(lab: Lab, agent: AgentProcess) -> None:
    """Nobody is published there: the packet goes on as world, long before the time limit, also one after another."""
    addresses = fresh(50)
    before = released(agent, "negative")
    with Sink(lab.node_b) as sink:
        began = time.monotonic()
        send(lab.pods[0].namespace, addresses, 5)
        assert len(sink.wait(250)) == 250
        assert time.monotonic() - began < 1
        assert sink.by_address() == dict.fromkeys(addresses, numbered(5))
    assert released(agent, "negative") - before >= 40


def test_a_packet_waits_no_longer_than_the_limit(lab: Lab, agent: AgentProcess, proxy: Proxy) -> None:
    """The store is slower than the limit: the packet goes on as world, and the audit knows of it."""
    (address,) = fresh(1)
    lab.publish(address)
    before = released(agent, "timeout")
    proxy.delay(0.6)
    with Sink(lab.node_b) as sink:
        began = time.monotonic()
        send(lab.pods[0].namespace, [address], 3)
        arrived = sink.wait(3)
        assert len(arrived) == 3
        assert 0.24 < arrived[0].at - began < 1
    assert released(agent, "timeout") - before == 3
    wait_until(lambda: identity_of(lab, address) == SERVER_IDENTITY, 3)
    (window,) = [w for w in audit(lab) if w["address"] == address]
    assert (window["packets"], window["identity"], window["verdict"]) == (3, SERVER_IDENTITY, "allowed")


def audit(lab: Lab) -> list[dict[str, object]]:
    """Return the audit of the last minute."""
    import json  # noqa: PLC0415

    windows: list[dict[str, object]] = json.loads(lab.cli("audit", "--since", "1m", "-o", "json").stdout)[
        "windows"
    ]
    return windows


def test_status_shows_that_packets_are_held(lab: Lab, agent: AgentProcess) -> None:
    """In the object and on the screen; what is wrong, for the exit code, may be what another test has done."""
    assert status(lab)["datapath"]["holding"] == "on"
    assert "Holding:    on\n" in lab.cli("status", check=False).stdout


def test_a_scanning_pod_exhausts_its_own_share_only(
    lab: Lab, agent: AgentProcess, record_property: Callable[[str, object], None]
) -> None:
    """One pod sends to address after address as fast as it can; another's first connections still succeed, held."""
    quiet, busy = fresh(60), fresh(60)
    lab.publish_many([*quiet, *busy])
    pod = lab.pods[1].namespace
    before = counters(pod)["TcpExt.TCPSynRetrans"]
    alone = connect_all(pod, quiet)
    refused = refusals(agent)
    with Scan(lab.pods[0].namespace):
        wait_until(lambda: refusals(agent) > refused, 30)
        beside = connect_all(pod, busy)
    say(record_property, "beside a scan", beside, alone)
    assert counters(pod)["TcpExt.TCPSynRetrans"] == before
    assert sorted(beside)[30] < 100


def refusals(agent: AgentProcess) -> int:
    """Return how often an interface was told that it has had its share: of signals, or of holding."""
    return packets(agent, "suppressed_rate") + held(agent, "refused_rate") + held(agent, "refused_interface")


class Scan:
    """A process in a pod that sends a datagram to each address of a /17, over and over."""

    _CODE = """
import itertools, socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in itertools.cycle(range(1 << 15)):
    sock.sendto(b"scan", (f"10.2.{128 + (number >> 8)}.{number & 255}", 9))
"""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    def __enter__(self) -> None:
        import sys  # noqa: PLC0415

        self._process = self._namespace.popen(sys.executable, "-I", "-S", "-c", self._CODE)

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
