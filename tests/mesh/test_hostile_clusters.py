"""A cluster that floods, claims what is others', and writes what no reader was made for: it harms nobody but itself.

Cluster c is the liar, b the good one, whose pods are first talked to while c does its worst.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import SERVER_IDENTITY, Lab, Store, remote_address
from tests.support.neighbour import Neighbour
from tests.support.node import (
    Misses,
    assert_unharmed,
    cluster,
    connect,
    have_wait,
    identity_of,
    memory_mib,
    metric,
    missed_until,
    send_udp,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

OF_C = 3 * 65_536 + 1
CIDR_OF_C = "10.3.0.0/16"
ROOM_MIB = 64
"""What the agent may grow by, whatever c does: 100,000 keys and numbers to remember are 20 MiB."""
_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab with cluster b; its addresses are used once."""
    with Lab(pods=1) as built:
        built.publish_many([remote_address(number) for number in range(1, 10_000)])
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent that lives through all of it, without an error of its own."""
    running = lab.start_agent()
    yield running
    assert_unharmed(running)
    assert running.stop() == 0


@pytest.fixture
def liar(lab: Lab, agent: AgentProcess) -> Iterator[Neighbour]:
    """Cluster c, described but not joined yet; gone for the agent too at the end."""
    with Neighbour(lab, "c", 3) as neighbour:
        neighbour.fill(cidrs=[CIDR_OF_C], identities=[OF_C])
        yield neighbour
        neighbour.leave()
        wait_until(lambda: not cluster(lab, "c"), 10, "cluster c gone")


@pytest.fixture
def writes(lab: Lab, liar: Neighbour) -> Iterator[Store]:
    """Write into c's etcd, many keys at once."""
    store = Store(lab.node_a, int(liar.etcd.url.rpartition(":")[2]))
    yield store
    store.close()


def join(lab: Lab, liar: Neighbour) -> None:
    """Have c join and be followed."""
    liar.join()
    wait_until(lambda: cluster(lab, "c").get("state") == "ready", 60, "cluster c ready")


def put_raw(liar: Neighbour, key: str, value: bytes) -> None:
    """Write bytes that are no text."""
    words = {"key": base64.b64encode(key.encode()).decode(), "value": base64.b64encode(value).decode()}
    liar.etcd.call("kv/put", words)


def refusals(agent: AgentProcess, kind: str, of: str = "c") -> int:
    """Return how many records of a kind were refused."""
    return int(metric(agent, "lazymesh_records_refused_total", target_cluster=of, kind=kind))


def logged(agent: AgentProcess, words: str, name: str) -> int:
    """Return how often something was said of a record."""
    return sum(words in line and f"name={name} " in line for line in agent.log.splitlines())


class Memory:
    """The agent's memory, from now on."""

    def __init__(self, agent: AgentProcess) -> None:
        self._pid = agent.pid
        Path(f"/proc/{agent.pid}/clear_refs").write_text("5")  # the most that it had is what it has
        self._before = memory_mib(agent.pid)

    def assert_bounded(self) -> None:
        """At no time more than what it may have in addition."""
        assert memory_mib(self._pid, "VmHWM") < self._before + ROOM_MIB


def first_packets(lab: Lab, seconds: float) -> list[float]:
    """Talk to one pod of b after the other; each is resolved. Return the milliseconds that each took."""
    took = []
    with Misses(lab.socket) as misses:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            address = remote_address(next(_NUMBERS))
            event = misses.provoke(lab.pods[0].namespace, address)
            assert event["outcome"] == "installed", event
            took.append(float(event["latency_ms"]))
    return sorted(took)


@pytest.mark.patience(400)  # etcd takes a hundred thousand writes, on a busy machine in minutes
def test_a_flood_of_identities_delays_nobody_else(
    lab: Lab, agent: AgentProcess, liar: Neighbour, writes: Store
) -> None:
    """A hundred thousand at once, a third of them others': counted all, told of some, b resolves meanwhile."""
    memory, others = Memory(agent), 4 * 65_536
    numbers = range(OF_C + 1, OF_C + 100_000)
    writes.put_many(
        {
            f"cilium/state/identities/v1/id/{n}": f"k8s:app=server;k8s:n={n};k8s:io.cilium.k8s.policy.cluster=c;"
            for n in numbers
        }
    )
    quiet, mark = first_packets(lab, 1), len(agent.log)
    liar.join()
    took = first_packets(lab, 3)
    while cluster(lab, "c").get("state") != "ready":
        took += first_packets(lab, 1)
    print(f"ms of first packets, median and worst: {_both(quiet)} quiet, {_both(sorted(took))} in the flood")
    assert max(took) < 1_000, "whoever is not served for so long has been forgotten"
    assert refusals(agent, "identity") == sum(number >= others for number in numbers)
    log = agent.log[mark:]
    assert 0 < log.count("record refused") <= 1_024
    assert log.count("further refused records of this cluster are only counted") == 1
    lab.publish_identity(65_537, {"app": "server"})
    wait_until(lambda: logged(agent, "record refused", "65537") == 1, 5, "b, which is still heard")
    memory.assert_bounded()
    assert cluster(lab, "c")["identities"] == 100_000
    liar.publish("10.3.0.9", others - 1)
    liar.publish("10.3.0.10", others)
    missed_until(lab, "10.3.0.9", others - 1)
    with Misses(lab.socket) as misses:
        event = misses.provoke(lab.pods[0].namespace, "10.3.0.10")
    assert event["reason"] == "forged"


def _both(took: list[float]) -> str:
    return f"{took[len(took) // 2]:.1f} and {took[-1]:.1f}"


def test_megabytes_of_labels_fill_nobodys_memory(
    lab: Lab, agent: AgentProcess, liar: Neighbour, writes: Store
) -> None:
    """Fifty identities of a megabyte each, in a listing and in a watch: refused each, never all in memory."""
    memory = Memory(agent)
    big = "k8s:io.cilium.k8s.policy.cluster=c;k8s:x=" + "y" * 1_000_000 + ";"
    for number in range(50):
        writes.put_many({f"cilium/state/identities/v1/id/{OF_C + 100 + number}": big})
    count = refusals(agent, "identity")
    join(lab, liar)
    assert refusals(agent, "identity") == count + 50
    for number in range(20):
        writes.put_many({f"cilium/state/identities/v1/id/{OF_C + 100 + number}": big + "again;"})
    wait_until(lambda: refusals(agent, "identity") == count + 70, 30, "the rewritten ones refused too")
    memory.assert_bounded()
    assert first_packets(lab, 0.5)


def test_labels_that_may_be_long_are_not_kept(
    lab: Lab, agent: AgentProcess, liar: Neighbour, writes: Store
) -> None:
    """A thousand identities of a thousand labels each are a million labels, and a thousand numbers."""
    memory = Memory(agent)
    for first in range(OF_C + 1, OF_C + 1_001, 50):
        writes.put_many(
            {
                f"cilium/state/identities/v1/id/{number}": "k8s:io.cilium.k8s.policy.cluster=c;"
                + "".join(f"k8s:a{number}-{label}=1;" for label in range(1_000))
                for number in range(first, first + 50)
            }
        )
    join(lab, liar)
    assert cluster(lab, "c")["identities"] == 1_001
    memory.assert_bounded()


NODES = {
    "NaN": b'{"Name":"n","Cluster":"c","ClusterID":NaN}',
    "infinity": b'{"Name":"n","Cluster":"c","ClusterID":1e999}',
    "no UTF-8": b'{"Name":"n\xff","Cluster":"c","ClusterID":3}',
    "its cluster twice": b'{"Name":"n","Cluster":"c","ClusterID":3,"Cluster":"b"}',
    "its id twice": b'{"Name":"n","Cluster":"c","ClusterID":3,"ClusterID":2}',
    "deep": b'{"Name":"n","Cluster":"c","ClusterID":3,"Labels":' + b'{"a":' * 10_000,
    "everything": b'{"Name":"n","Cluster":"c","ClusterID":3,"IPv4AllocCIDR":{"IP":"0.0.0.0","Mask":"AAAAAA=="}}',
    "loopback": b'{"Name":"n","Cluster":"c","ClusterID":3,"IPv4AllocCIDR":{"IP":"127.0.0.0","Mask":"//8AAA=="}}',
}


def test_nodes_that_nobody_writes_claim_nothing(lab: Lab, agent: AgentProcess, liar: Neighbour) -> None:
    """Each is counted whenever it is written, told of once, and b's addresses stay b's."""
    join(lab, liar)
    first = refusals(agent, "node")
    for times in (1, 2):
        for what, value in NODES.items():
            before = refusals(agent, "node")
            put_raw(liar, "cilium/state/nodes/v1/c/n", value)
            wait_until(lambda before=before: refusals(agent, "node") == before + 1, 5, f"{what} refused")
        assert refusals(agent, "node") == first + times * len(NODES)
        assert logged(agent, "record refused", "n") == 1
    address = remote_address(next(_NUMBERS))
    assert connect(lab.pods[0].namespace, address) is not None
    put_raw(liar, "cilium/state/nodes/v1/c/n/below", b"{}")
    wait_until(lambda: refusals(agent, "node") == first + 2 * len(NODES) + 1, 5, "a key of no node counted")


PAIRS = {
    "NaN": (b'{"IP":"%b","HostIP":"192.168.100.2","ID":NaN}', "malformed"),
    "a fraction": (b'{"IP":"%b","HostIP":"192.168.100.2","ID":196609.5}', "malformed"),
    "no UTF-8": (b'{"IP":"%b","HostIP":"192.168.100.\xff","ID":196609}', "malformed"),
    "deep": (b'{"IP":"%b","HostIP":"192.168.100.2","ID":196609,"x":' + b"[" * 20_000, "malformed"),
    "an identity twice": (b'{"IP":"%b","HostIP":"192.168.100.2","ID":196609,"ID":131073}', "forged"),
    "an address twice": (b'{"IP":"%b","HostIP":"192.168.100.2","ID":196609,"IP":"10.2.0.1"}', "malformed"),
}


@pytest.mark.parametrize("what", PAIRS)
def test_pairs_that_nobody_writes_make_no_entry(
    lab: Lab, agent: AgentProcess, liar: Neighbour, what: str
) -> None:
    """Of a key that occurs twice the last counts, as for every Go reader; told of once, however often it is written."""
    join(lab, liar)
    value, reason = PAIRS[what]
    address = f"10.3.7.{1 + list(PAIRS).index(what)}"
    with Misses(lab.socket) as misses:
        for _ in range(3):
            put_raw(liar, liar.ip_key(address), value.replace(b"%b", address.encode()))
        event = misses.provoke(lab.pods[0].namespace, address)
        assert (event["outcome"], event["reason"]) == ("absent", reason)
        for _ in range(3):
            put_raw(liar, liar.ip_key(address), value.replace(b"%b", address.encode()))
            send_udp(lab.pods[0].namespace, address, 10)
        known = remote_address(next(_NUMBERS))
        assert misses.provoke(lab.pods[0].namespace, known)["outcome"] == "installed"
    assert identity_of(lab, address) is None
    assert sum(f"address={address} " in line for line in agent.log.splitlines()) == 1


def test_a_crowd_of_keys_between_a_nodes_pods_hides_none(
    lab: Lab, agent: AgentProcess, liar: Neighbour, writes: Store
) -> None:
    """More keys than a /24 has addresses: its pods are then read one by one, and all are found."""
    pods = [f"10.3.9.{number}" for number in range(100, 200)]
    writes.put_many({liar.ip_key(f"10.3.9.0{number}"): "{}" for number in range(300)})
    writes.put_many(
        {liar.ip_key(ip): json.dumps({"IP": ip, "HostIP": "192.168.100.3", "ID": OF_C}) for ip in pods}
    )
    join(lab, liar)
    liar.etcd.freeze()
    try:
        have_wait(lab, [f"10.3.{number}.1" for number in range(20, 28)], pods)
    finally:
        liar.etcd.thaw()
    wait_until(lambda: all(identity_of(lab, ip) == OF_C for ip in pods), 5, "every pod of c resolved")
    assert cluster(lab, "c")["breaker"] == "closed"
    assert "a /24 could not be read whole" in agent.log


def test_identity_of_another_cluster_is_not_its_to_change(
    lab: Lab, agent: AgentProcess, liar: Neighbour
) -> None:
    """Cluster c gives b's servers other labels, then withdraws their identity: b's pods do not notice."""
    join(lab, liar)
    address = remote_address(next(_NUMBERS))
    assert connect(lab.pods[0].namespace, address) is not None
    before = refusals(agent, "identity")
    for cluster_of in ("b", "c"):
        labels = f"k8s:app=other;k8s:io.cilium.k8s.policy.cluster={cluster_of};"
        liar.etcd.put(liar.identity_key(SERVER_IDENTITY), labels)
    wait_until(lambda: refusals(agent, "identity") == before + 2, 5, "both refused")
    assert logged(agent, "record refused", str(SERVER_IDENTITY)) == 1
    liar.etcd.delete(liar.identity_key(SERVER_IDENTITY))
    liar.publish_identity(OF_C + 1)
    wait_until(lambda: cluster(lab, "c")["identities"] == 2, 5, "what was written behind it")
    assert identity_of(lab, address) == SERVER_IDENTITY
    assert connect(lab.pods[0].namespace, address) is not None
    assert connect(lab.pods[0].namespace, remote_address(next(_NUMBERS))) is not None


@pytest.mark.parametrize("what", ["cidrs", "addresses"])
def test_nodes_that_all_claim_the_same_delay_nobody_else(
    lab: Lab, agent: AgentProcess, liar: Neighbour, writes: Store, what: str
) -> None:
    """A thousand records full of one CIDR, or six hundred with the same addresses: each is counted, none is listed."""
    cidrs = [{"IP": "10.3.0.0", "Mask": "//8AAA=="}] * (500 if what == "cidrs" else 1)
    ips = [{"IP": f"11.0.{n >> 8}.{n & 255}"} for n in range(1 if what == "cidrs" else 2_000)]
    rest = {
        "IPv4SecondaryAllocCIDRs": cidrs,
        "IPAddresses": ips,
        "Labels": {"topology.kubernetes.io/region": "x"},
    }
    names = [f"m{number}" for number in range(1_000 if what == "cidrs" else 600)]
    for at in range(0, len(names), 10):
        records = {n: {"Name": n, "Cluster": "c", "ClusterID": 3, **rest} for n in names[at : at + 10]}
        writes.put_many({f"cilium/state/nodes/v1/c/{n}": json.dumps(records[n]) for n in records})
    memory, before = Memory(agent), refusals(agent, "node")
    liar.join()
    began, took = time.monotonic(), first_packets(lab, 1)
    while cluster(lab, "c").get("state") != "ready":
        took += first_packets(lab, 1)
    joined_ms = (time.monotonic() - began) * 1_000
    print(f"ms of first packets, median and worst: {_both(sorted(took))}, while c joined in {joined_ms:.0f}")
    assert max(took) < joined_ms / 10, "nobody waits until all of them are taken in"
    assert refusals(agent, "node") == before
    memory.assert_bounded()


def test_claims_without_number_leave_room_for_the_others(
    lab: Lab, agent: AgentProcess, liar: Neighbour, writes: Store
) -> None:
    """Thirty thousand pod CIDRs: what is too much is refused; a node of b that comes later still counts."""
    mask = base64.b64encode(b"\xff\xff\xff\xff").decode()
    for number in range(100):
        cidrs = [{"IP": f"10.{100 + number}.{n // 250}.{n % 250}", "Mask": mask} for n in range(300)]
        record = {"Name": f"m{number}", "Cluster": "c", "ClusterID": 3, "IPv4SecondaryAllocCIDRs": cidrs}
        writes.put_many({f"cilium/state/nodes/v1/c/m{number}": json.dumps(record)})
    before = refusals(agent, "node")
    join(lab, liar)
    assert refusals(agent, "node") == before + 100 - 66
    address = "10.77.0.1"
    lab.publish_node("late", ("10.77.0.0/24", None))
    lab.publish(address)
    missed_until(lab, address, SERVER_IDENTITY, 15)
