"""The stand-in for cilium-agent does what was seen of real ones; everything beside Cilium is tested on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath.libbpf import Map
from tests.support import tcx
from tests.support.bpfobject import map_exists
from tests.support.bystander import Bystander
from tests.support.cilium import Cilium
from tests.support.cilium_boot import PINNED, SWITCHED
from tests.support.cilium_ipcache import (
    HAS_TUNNEL_EP,
    HOST,
    IPV6_TUNNEL_EP,
    REMOTE_CLUSTER,
    REMOTE_NODE,
    WORLD,
    WORLD_IPV4,
    WORLD_IPV6,
    Entry,
)
from tests.support.cilium_world import KINDS, LINK_LOCAL_A, LOCAL_IDENTITY, ROUTER_A, RemoteNode
from tests.support.etcd import wait_until
from tests.support.lab import (
    NODE_A,
    NODE_B,
    OTHER_IDENTITY,
    REMOTE_CIDRS,
    SERVER_IDENTITY,
    Lab,
    pod_address,
    remote_address,
)
from tests.support.traffic import EchoServer, Probe, probe

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.needs("clang")

EP = NODE_B[0]
WRITTEN = {
    "v1": Entry(SERVER_IDENTITY, EP, 0, 0),
    "v2": Entry(SERVER_IDENTITY, EP, 0, HAS_TUNNEL_EP),
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab; each test brings an agent of its own."""
    with Lab(pods=2) as built:
        yield built


# The thesis.


@pytest.mark.parametrize("family", [4, 6])
def test_peer_without_entry_is_dropped_until_somebody_writes_one(
    cilium: Cilium, lab: Lab, flow, family: int
) -> None:
    """World is denied, an allowed identity passes as soon as it is there, a wrong one is dropped again."""
    known, unknown = remote_address(0, family), remote_address(1, family)
    world = WORLD_IPV4 if family == 4 else WORLD_IPV6
    assert cilium.upsert(known)
    assert flow(lab.pods[0], known).passes()
    late = flow(lab.pods[0], unknown)
    assert late.is_lost()
    assert (
        cilium.packets(outcome="denied")
        == cilium.packets(outcome="denied", identity=world, device="lxc0")
        == 1
    )
    cilium.write_from_outside(unknown, SERVER_IDENTITY)
    assert late.passes()
    cilium.write_from_outside(unknown, OTHER_IDENTITY)
    assert late.is_lost()
    assert cilium.packets(outcome="denied", identity=OTHER_IDENTITY) == 1
    assert cilium.packets(outcome="forwarded", identity=SERVER_IDENTITY, tunnel=True) == 2


def test_every_packet_of_an_established_connection_is_judged(agent: Cilium, lab: Lab, flow) -> None:
    """A flow that began lives by the entry and the policy of the moment."""
    peer = remote_address(0)
    agent.upsert(peer)
    began = flow(lab.pods[0], peer)
    assert began.passes()
    agent.delete(peer)
    assert began.is_lost()
    agent.upsert(peer, OTHER_IDENTITY)
    assert began.is_lost()
    agent.allow(OTHER_IDENTITY)
    assert began.passes()
    agent.revoke(OTHER_IDENTITY)
    assert began.is_lost()
    agent.allow(0)
    assert began.passes()


def test_answers_of_pods_pass_whatever_the_policy_says(cilium: Cilium, lab: Lab) -> None:
    """A peer's connection to a pod is judged on its way in only, and so is its answer's way out."""
    pod = lab.pods[0]
    with EchoServer(pod.namespace):
        peers = [remote_address(3), remote_address(3, 6)]
        for peer, address in zip(peers, (pod.ipv4, pod.ipv6), strict=True):
            (exchange,) = probe(lab.node_b, Probe(tcp=(address,), source=peer, timeout=1, echoes=1))
            assert exchange.ok
    assert cilium.packets(outcome="denied") == 0
    assert cilium.packets(outcome="reply", direction="egress", device=pod.interface) > 0


def test_ingress_policy_judges_the_source(lab: Lab) -> None:
    """A source without an entry is world and stays out; with one it is let in."""
    pod, peer = lab.pods[1], remote_address(4)
    ask = Probe(tcp=(pod.ipv4,), source=peer, timeout=0.3, echoes=0)
    with EchoServer(pod.namespace), Cilium(lab, ingress_allowed={SERVER_IDENTITY}) as agent:
        assert not probe(lab.node_b, ask)[0].ok
        denied = {"direction": "ingress", "outcome": "denied", "identity": WORLD_IPV4, "device": "lxc1"}
        assert agent.packets(**denied) == 1
        agent.write_from_outside(peer, SERVER_IDENTITY)
        assert probe(lab.node_b, ask)[0].ok


def test_no_policy_lets_everything_through(lab: Lab, flow) -> None:
    """Pods that no policy selects talk to the world."""
    with Cilium(lab, allowed=None) as agent:
        assert flow(lab.pods[0], remote_address(0)).passes()
        assert agent.packets(identity=WORLD_IPV4, outcome="forwarded") == 1


# The map.


@pytest.mark.parametrize(
    ("options", "name", "value_size", "flags"),
    [
        ({"layout": "v1"}, "cilium_ipcache", 12, 1),
        ({"layout": "v2", "map_flags": 1}, "cilium_ipcache_v2", 24, 1),
        ({"layout": "v2"}, "cilium_ipcache_v2", 24, 129),
    ],
    ids=["1.17", "1.18", "1.19"],
)
def test_map_has_the_versions_name_and_layout(
    lab: Lab, options: dict, name: str, value_size: int, flags: int
) -> None:
    """An LPM trie of 512,000 entries under <bpffs>/tc/globals, readable in the golden vectors' bytes."""
    with Cilium(lab, **options) as agent:
        assert agent.pin == lab.bpffs / "tc" / "globals" / name
        agent.upsert("10.2.0.5", 131_073, host_ip="172.18.0.2")
        agent.upsert("fd00:10:244:1::d643", 131_073, host_ip="fc00:c111::2", key=255)
        pinned = Map.pinned(agent.pin)
        raw = dict(pinned.items())
        layout = pinned.layout
        pinned.close()
    assert (layout.kind, layout.key_size, layout.value_size) == (11, 24, value_size)
    assert (layout.max_entries, layout.flags) == (512_000, flags)
    four = bytes.fromhex("40000000 0000 00 01 0a020005 000000000000000000000000")
    six = bytes.fromhex("a0000000 0000 00 02 fd00001002440001000000000000d643")
    if value_size == 12:
        assert raw[four] == bytes.fromhex("01000200 ac120002 0000 00 00")
        assert raw[six] == bytes.fromhex("01000200 00000000 0000 ff 00")
    else:
        assert raw[four] == bytes.fromhex("01000200 ac120002 000000000000000000000000 0000 00 02")
        assert raw[six] == bytes.fromhex("01000200 fc00c111000000000000000000000002 0000 ff 06")


def test_agent_writes_world_nodes_and_pod_cidrs_at_its_start(lab: Lab) -> None:
    """Everything that needs no pod of a peer is there: the pod CIDRs as a world that has a tunnel endpoint."""
    own = {
        "0.0.0.0/0": Entry(WORLD_IPV4, None, 0, 0),
        "::/0": Entry(WORLD_IPV6, None, 0, 0),
        **{address: Entry(HOST, None, 0, 0) for address in (*NODE_A, *ROUTER_A, LINK_LOCAL_A)},
        **{address: Entry(REMOTE_NODE, None, 0, REMOTE_CLUSTER) for address in NODE_B},
        **{pod_address(n, f): Entry(LOCAL_IDENTITY, None, 0, 0) for n in (0, 1) for f in (4, 6)},
    }
    cidrs = dict(zip(REMOTE_CIDRS, (WORLD_IPV4, WORLD_IPV6), strict=True))
    with Cilium(lab) as agent:
        fallback = {cidr: Entry(world, EP, 0, HAS_TUNNEL_EP) for cidr, world in cidrs.items()}
        assert agent.entries() == own | fallback
        agent.upsert_node(RemoteNode("b-2", ("192.168.100.7",), ("10.2.9.0/24",), key=3))
        assert agent.entries()["10.2.9.0/24"] == Entry(WORLD_IPV4, "192.168.100.7", 3, HAS_TUNNEL_EP)


def test_single_stack_world_is_one_and_there_is_no_ipv6_default(lab: Lab, flow) -> None:
    """Without IPv6 the world is 2, and an IPv6 lookup can find nothing at all; peers' entries come all the same."""
    with Cilium(lab, dual_stack=False) as agent:
        entries = agent.entries()
        assert entries["0.0.0.0/0"].identity == entries[REMOTE_CIDRS[0]].identity == WORLD
        assert REMOTE_CIDRS[1] in entries
        assert "::/0" not in entries
        assert flow(lab.pods[0], remote_address(0)).is_lost()
        assert agent.packets(identity=WORLD, outcome="denied") == 1


def test_old_agents_have_no_pod_cidrs(lab: Lab) -> None:
    """1.17 has no fallback entries, and no flag bits that came later."""
    with Cilium(lab, layout="v1") as agent:
        entries = agent.entries()
    assert not set(REMOTE_CIDRS) & set(entries)
    assert entries[NODE_B[0]] == Entry(REMOTE_NODE, None, 0, 0)


def test_upgraded_node_keeps_the_old_versions_pin(lab: Lab) -> None:
    """Both pins are there after an upgrade; only the running version's is kept up to date."""
    with Cilium(lab, layout="v2", upgraded=True) as agent:
        assert agent.stale_pin.name == "cilium_ipcache"
        agent.upsert(remote_address(0))
        stale = Map.pinned(agent.stale_pin)
        assert stale.layout.value_size == 12
        assert len(list(stale.items())) < len(agent.entries())
        stale.close()
        assert agent.programs()["lxc0"].ipcache_ids == {agent.map_id}


# The writer.


def test_entries_of_pods_follow_from_their_records(agent: Cilium) -> None:
    """Endpoint, flags and identity are those that the real writer derives, in the odd cases too."""
    agent.upsert("10.2.1.1", host_ip="fc00:c111::2")
    agent.upsert("10.2.1.2", host_ip=NODE_A[0])
    agent.upsert("10.2.1.3", host_ip="", key=7)
    agent.upsert("10.2.1.4", 0)
    agent.upsert("10.2.1.5", WORLD)
    agent.upsert("10.2.1.6", HOST)
    agent.upsert("10.2.1.224/28")
    agent.upsert("10.2.1.7", LOCAL_IDENTITY, host_ip=NODE_A[0], cluster_id=None)
    assert {prefix: entry for prefix, entry in agent.entries().items() if prefix.startswith("10.2.1.")} == {
        "10.2.1.1": Entry(SERVER_IDENTITY, "fc00:c111::2", 0, HAS_TUNNEL_EP | IPV6_TUNNEL_EP),
        "10.2.1.2": Entry(SERVER_IDENTITY, None, 0, 0),
        "10.2.1.3": Entry(SERVER_IDENTITY, None, 7, 0),
        "10.2.1.4": Entry(0, EP, 0, HAS_TUNNEL_EP),
        "10.2.1.5": Entry(WORLD, EP, 0, HAS_TUNNEL_EP),
        "10.2.1.6": Entry(REMOTE_NODE, EP, 0, HAS_TUNNEL_EP),
        "10.2.1.224/28": Entry(SERVER_IDENTITY, EP, 0, HAS_TUNNEL_EP),
        "10.2.1.7": Entry(LOCAL_IDENTITY, None, 0, 0),
    }


def test_identity_of_another_clusters_range_is_skipped(agent: Cilium) -> None:
    """A peer speaks for its own range only; node-local identities are of nobody's."""
    assert not agent.upsert("10.2.1.1", 3 << 16)
    assert not agent.upsert("10.2.1.1", 0x0100_0001)
    assert "10.2.1.1" not in agent.entries()
    assert len(agent.log) == 2


@pytest.mark.parametrize(("layout", "taken_for"), [("v1", WORLD_IPV4), ("v2", 0)])
def test_identity_zero_is_world_only_for_old_agents(lab: Lab, flow, layout: str, taken_for: int) -> None:
    """Up to 1.17 an identity 0 falls back to world; later it is taken as it is."""
    with Cilium(lab, layout=layout) as agent:
        agent.upsert(remote_address(0), 0)
        assert flow(lab.pods[0], remote_address(0)).is_lost()
        assert agent.packets(outcome="denied", identity=taken_for) == 1


def test_identical_upsert_is_suppressed_and_repairs_nothing(cilium: Cilium) -> None:
    """What others deleted or overwrote comes back with a change of the record only, were it the pod's name."""
    peer, ours = "10.2.1.1", WRITTEN[cilium.settings.layout]
    assert cilium.upsert(peer)
    assert cilium.delete_from_outside(peer)
    assert not cilium.upsert(peer)
    assert peer not in cilium.entries()
    assert cilium.upsert(peer, pod="another")
    assert cilium.entries()[peer] == ours
    cilium.write_from_outside(peer, OTHER_IDENTITY)
    assert not cilium.upsert(peer, pod="another")
    assert cilium.entries()[peer].identity == OTHER_IDENTITY
    assert cilium.upsert(peer, pod="another", namespace="elsewhere")
    assert cilium.entries()[peer] == ours
    assert cilium.log == []


def test_agent_that_learns_a_prefix_later_takes_it_over(cilium: Cilium) -> None:
    """It writes over what stands there, deletes it in the end, and leaves alone what it never learnt."""
    cilium.write_from_outside("10.2.1.1", OTHER_IDENTITY, key=9)
    cilium.write_from_outside("10.2.1.2", OTHER_IDENTITY)
    assert cilium.upsert("10.2.1.1")
    assert cilium.entries()["10.2.1.1"] == WRITTEN[cilium.settings.layout]
    assert cilium.delete("10.2.1.1")
    assert not cilium.delete("10.2.1.2")
    assert "10.2.1.1" not in cilium.entries()
    assert "10.2.1.2" in cilium.entries()


def test_delete_of_what_others_deleted_is_logged(agent: Cilium) -> None:
    """The agent finds nothing there, says so, and goes on."""
    agent.upsert("10.2.1.1")
    agent.delete_from_outside("10.2.1.1")
    assert agent.delete("10.2.1.1")
    assert agent.log == ["unable to delete from bpf map: 10.2.1.1: No such file or directory"]


def test_full_map_is_logged_and_not_tried_again(lab: Lab) -> None:
    """Without room the entry is missing until the record changes, even when there is room again."""
    with Cilium(lab, max_entries=20) as agent:
        peers = [f"10.2.1.{number}" for number in range(20)]
        agent.upsert_many(peers)
        missing = [peer for peer in peers if peer not in agent.entries()]
        assert len(agent.entries()) == 20
        assert len(agent.log) == len(missing) > 0
        agent.delete(peers[0])
        assert not agent.upsert(missing[0])
        assert agent.upsert(missing[0], pod="another")
        assert missing[0] in agent.entries()


# The programs.


def test_only_tail_calls_and_the_uplink_refer_to_the_ipcache(cilium: Cilium, lab: Lab) -> None:
    """The program on a pod's device does not name the map; the programs in its pinned array do."""
    loaded = cilium.programs()
    assert {name: one.info.name for name, one in loaded.items()} == {
        "eth0": "cil_from_netdev",
        "lxc0": "cil_from_contai",
        "lxc1": "cil_from_contai",
    }
    assert cilium.map_id in loaded["eth0"].info.map_ids
    assert cilium.map_id not in loaded["lxc0"].info.map_ids
    assert all(cilium.map_id in call.map_ids for call in loaded["lxc0"].calls)
    assert all(one.ipcache_ids == {cilium.map_id} for one in loaded.values())
    calls = Map.pinned(lab.bpffs / "tc/globals/cilium_calls_00101")
    assert calls.map_id in loaded["lxc0"].info.map_ids
    calls.close()


def test_tcx_links_are_pinned_where_cilium_pins_them(agent: Cilium, lab: Lab) -> None:
    """By endpoint for pods, by device for the uplink; no clsact filter anywhere."""
    for pin in ("endpoints/101/links/cil_from_container", "devices/eth0/links/cil_from_netdev"):
        tcx.TcxLink.pinned(lab.bpffs / "cilium" / pin).close()
    assert lab.node_a.call(tcx.filters, "lxc0") == []


def test_clsact_filters_have_ciliums_place_and_name(lab: Lab) -> None:
    """Priority as configured, handle 1, the device in the name; no tcx program anywhere."""
    for priority in (1, 3):
        with Cilium(lab, attach="clsact", filter_priority=priority):
            (found,) = lab.node_a.call(tcx.filters, "lxc0")
            assert (found.priority, found.handle) == (priority, 1)
            assert found.name == "cil_from_container-lxc0"
            assert lab.node_a.call(tcx.tcx_programs, "lxc0") == []


def test_each_program_load_deletes_the_filters_of_others(cilium: Cilium, lab: Lab) -> None:
    """Both directions of that device; its own filter, the qdisc and other devices are left alone."""
    own = lab.node_a.call(tcx.filters, "lxc0")
    with Bystander(lab.node_a, lab.directory) as other:
        for hook in tcx.HOOKS:
            other.filter("lxc0", hook=hook)
        other.filter("lxc1")
        cilium.reload("lxc0")
        left = lab.node_a.call(tcx.filters, "lxc0")
        assert [one.name for one in left] == [one.name for one in own]
        assert "bystander" in [one.name for one in lab.node_a.call(tcx.filters, "lxc1")]
        assert "clsact" in lab.node_a.run("tc", "qdisc", "show", "dev", "lxc0")


def test_filters_of_others_can_be_spared(lab: Lab) -> None:
    """For an agent whose clsact manners were not seen: it replaces its own filter and nothing else."""
    with (
        Cilium(lab, attach="clsact", wipes_filters=False) as agent,
        Bystander(lab.node_a, lab.directory) as other,
    ):
        other.filter("lxc0")
        agent.reload()
        assert len(lab.node_a.call(tcx.filters, "lxc0")) == 2


def test_tcx_program_of_others_stays_first_and_sees_every_packet(agent: Cilium, lab: Lab, flow) -> None:
    """The link is updated in its place at each load; packets that the policy drops have passed us before."""
    agent.upsert(remote_address(0))
    good, bad = flow(lab.pods[0], remote_address(0)), flow(lab.pods[0], remote_address(1))
    with Bystander(lab.node_a, lab.directory) as other:
        link = other.attach("lxc0")
        number = link.link_id
        for life in (agent.reload, agent.restart):
            order = lab.node_a.call(tcx.tcx_programs, "lxc0")
            assert order == [other.program_id, agent.programs()["lxc0"].info.program_id]
            before = other.packets
            assert good.passes()
            assert bad.is_lost()
            # The pod's kernel talks IPv6 of its own accord now and then.
            assert other.packets >= before + 2
            if life == agent.restart:
                life(repin_after=0, switch_after=0).wait(SWITCHED)
            else:
                life()
        assert lab.node_a.call(tcx.tcx_programs, "lxc0")[0] == other.program_id
        assert link.link_id == number


# The end, and other faults.


def test_pin_can_be_of_a_map_that_nobody_uses(agent: Cilium, lab: Lab, flow) -> None:
    """The fault of #45196: an empty map under the pin, agent and programs on another."""
    agent.upsert(remote_address(0))
    before = agent.map_id
    agent.orphan_pin()
    assert agent.entries() == {}
    assert flow(lab.pods[0], remote_address(0)).passes()
    assert agent.programs()["lxc0"].ipcache_ids == {before}


def test_agent_that_goes_leaves_no_trace(lab: Lab) -> None:
    """Pins, links, filters, qdiscs and maps go with it, also from the middle of a start."""
    for layout, attach in KINDS:
        with Cilium(lab, layout=layout, attach=attach) as agent:
            number = agent.map_id
            agent.restart(repin_after=0.05, fill_rate=1, switch_after=0).wait(PINNED)
            later = agent.map_id
        assert not (lab.bpffs / "tc").exists()
        assert not (lab.bpffs / "cilium").exists()
        for device in ("eth0", "lxc0", "lxc1"):
            assert lab.node_a.call(tcx.tcx_programs, device) == []
            assert "clsact" not in lab.node_a.run("tc", "qdisc", "show", "dev", device)
        for gone in (number, later):
            wait_until(lambda gone=gone: not map_exists(gone), what="the kernel to free the map")
