"""Records come, go and change: the entry follows within a second, in whatever order it is told."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest

from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.node import Misses, etcd_calls, identity_of, metric, send_udp, status, wait_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

HOSTS = {"eu-1": "192.168.101.1", "us-1": "192.168.101.2"}
ORDERS = [
    order
    for order in itertools.permutations(("withdraw", "publish other", "withdraw", "publish other"))
    if order[-1] == "publish other"
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab with a node in each of two regions; addresses are used once."""
    with Lab(pods=1) as built:
        node = json.loads(built.store.get("cilium/state/nodes/v1/b/b-1") or "")
        for region, host in HOSTS.items():
            node |= {
                "Name": f"b-{region}",
                "IPAddresses": [{"Type": "InternalIP", "IP": host}],
                "IPv4AllocCIDR": None,
                "IPv6AllocCIDR": None,
                "Labels": {"topology.kubernetes.io/region": region},
            }
            built.store.put_many({f"cilium/state/nodes/v1/b/b-{region}": json.dumps(node)})
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent that knows its region."""
    running = lab.start_agent("--cluster-region", "eu-1")
    yield running
    running.stop()


_NUMBERS = itertools.count(50)


@pytest.fixture(params=[4, 6])
def ip(request: pytest.FixtureRequest) -> str:
    """An address that no other test uses, of each family."""
    return remote_address(next(_NUMBERS), request.param)


def miss(lab: Lab, ip: str) -> None:
    """Let the pod send one packet to the address."""
    send_udp(lab.pods[0].namespace, ip, 1)


def test_entry_of_a_deleted_pod_is_gone_within_a_second(lab: Lab, agent: AgentProcess, ip: str) -> None:
    """The watch on the key tells it, no packet is needed."""
    lab.publish(ip)
    miss(lab, ip)
    wait_identity(lab, ip, SERVER_IDENTITY)
    lab.withdraw(ip)
    assert wait_identity(lab, ip, None) < 1
    assert metric(agent, "lazymesh_entries_evicted_total", reason="deleted") >= 1


def test_reused_address_gets_the_new_identity_within_a_second(lab: Lab, agent: AgentProcess, ip: str) -> None:
    """An address changes hands without a packet and without a gap."""
    lab.publish(ip)
    miss(lab, ip)
    wait_identity(lab, ip, SERVER_IDENTITY)
    lab.publish(ip, OTHER_IDENTITY)
    assert wait_identity(lab, ip, OTHER_IDENTITY) < 1


@pytest.mark.parametrize("family", [4, 6])
def test_pods_of_one_node_share_their_watches(lab: Lab, agent: AgentProcess, family: int) -> None:
    """One for each space. What happens to a neighbour before anybody talks to it matters to nobody."""
    first, second = (remote_address(next(_NUMBERS), family) for _ in range(2))
    lab.publish(first)
    miss(lab, first)
    wait_identity(lab, first, SERVER_IDENTITY)
    keys, ranges = _watched(lab)
    for identity in (OTHER_IDENTITY, SERVER_IDENTITY):
        lab.publish(second, identity)
    miss(lab, second)
    wait_identity(lab, second, SERVER_IDENTITY)
    assert _watched(lab) == (keys + 2, ranges)
    lab.publish(second, OTHER_IDENTITY)
    assert wait_identity(lab, second, OTHER_IDENTITY) < 1
    assert identity_of(lab, first) == SERVER_IDENTITY
    lab.withdraw(first)
    assert wait_identity(lab, first, None) < 1
    assert identity_of(lab, second) == OTHER_IDENTITY


def _watched(lab: Lab) -> tuple[int, int]:
    (cluster,) = [each for each in status(lab)["clusters"] if each["name"] == "b"]
    return cluster["watchedKeys"], cluster["watchedRanges"]


@pytest.mark.parametrize("order", sorted(set(ORDERS)))
def test_the_newest_record_wins_in_whatever_order_it_came(
    lab: Lab, agent: AgentProcess, ip: str, order: tuple[str, ...]
) -> None:
    """Deletes and creates of old and new pod mixed: the final entry is the newer one."""
    lab.publish(ip)
    miss(lab, ip)
    wait_identity(lab, ip, SERVER_IDENTITY)
    for step in order:
        if step == "withdraw":
            lab.withdraw(ip)
        else:
            lab.publish(ip, OTHER_IDENTITY)
    wait_identity(lab, ip, OTHER_IDENTITY)


def test_record_that_moves_between_pushed_and_pull_only_stays_installed(
    lab: Lab, agent: AgentProcess, ip: str
) -> None:
    """An exporter's filter changes: the record is written in the other space, then deleted in this one."""
    lab.publish(ip)
    miss(lab, ip)
    wait_identity(lab, ip, SERVER_IDENTITY)
    evicted = metric(agent, "lazymesh_entries_evicted_total")
    lab.publish(ip, OTHER_IDENTITY, space="ondemand")
    lab.withdraw(ip, space="default")
    wait_identity(lab, ip, OTHER_IDENTITY)
    assert metric(agent, "lazymesh_entries_evicted_total") == evicted
    lab.withdraw(ip, space="ondemand")
    assert wait_identity(lab, ip, None) < 1


def test_negative_answer_is_cached_and_cancelled_by_a_publication(
    lab: Lab, agent: AgentProcess, ip: str
) -> None:
    """Nothing is there: one read, then silence; the key appears: installed in under a second, no packet needed."""
    with Misses(lab.socket) as misses:
        miss(lab, ip)
        outcome = misses.next(ip)
    assert (outcome["outcome"], outcome["reason"], outcome["cluster"]) == ("absent", "not-found", "b")
    before = etcd_calls(lab, "Txn")
    miss(lab, ip)
    assert etcd_calls(lab, "Txn") == before
    lab.publish(ip)
    assert wait_identity(lab, ip, SERVER_IDENTITY) < 1


def test_pull_only_record_resolves_as_a_pushed_one(lab: Lab, agent: AgentProcess, ip: str) -> None:
    """What nobody watches is read on a miss, and kept true by a watch of its own."""
    lab.publish(ip, space="ondemand")
    with Misses(lab.socket) as misses:
        miss(lab, ip)
        assert misses.next(ip)["outcome"] == "installed"
    assert identity_of(lab, ip) == SERVER_IDENTITY
    lab.publish(ip, OTHER_IDENTITY, space="ondemand")
    assert wait_identity(lab, ip, OTHER_IDENTITY) < 1
    lab.withdraw(ip)
    assert wait_identity(lab, ip, None) < 1


@pytest.mark.parametrize("field", ["SyncScope", "syncScope"])
@pytest.mark.parametrize(("region", "outcome"), [("eu-1", "installed"), ("us-1", "absent")])
def test_regional_record_is_taken_from_our_own_region_only(
    lab: Lab, agent: AgentProcess, field: str, region: str, outcome: str
) -> None:
    """The record's host tells where it is; both spellings of the CFP count."""
    ip = remote_address(next(_NUMBERS))
    record = {"IP": ip, "Mask": None, "HostIP": HOSTS[region], "ID": SERVER_IDENTITY, field: "regional"}
    lab.store.put_many({f"cilium/state/ip/v1/default/{ip}": json.dumps(record)})
    with Misses(lab.socket) as misses:
        miss(lab, ip)
        event = misses.next(ip)
    assert event["outcome"] == outcome
    assert event["reason"] == (None if outcome == "installed" else "out-of-scope")


def test_a_burst_of_changes_ends_as_the_store_does(lab: Lab, agent: AgentProcess) -> None:
    """100 addresses, each published and withdrawn many times: the map ends equal to the store."""
    ips = [remote_address(500 + number) for number in range(100)]
    lab.publish_many(ips)
    for ip in ips:
        miss(lab, ip)
    for turn in range(5):
        lab.publish_many(ips, OTHER_IDENTITY if turn % 2 else SERVER_IDENTITY)
        lab.withdraw(*ips[turn::3])
    expected = {ip: lab.store.get(f"cilium/state/ip/v1/default/{ip}") for ip in ips}
    for ip, value in expected.items():
        wait_identity(lab, ip, json.loads(value)["ID"] if value else None)
