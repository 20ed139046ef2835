"""lazymesh beside Cilium on a node: what it resolves, and that it leaves Cilium's entries alone."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from lazymesh.datapath import abi
from tests.support.cilium import Cilium
from tests.support.etcd import wait_until
from tests.support.lab import (
    METRICS_PORT,
    NODE_A,
    NODE_B,
    OTHER_IDENTITY,
    REMOTE_CIDRS,
    SERVER_IDENTITY,
    Lab,
    remote_address,
)
from tests.support.node import (
    Misses,
    beside_cilium,
    connect,
    dump,
    http_status,
    launched,
    metric,
    options,
    raw_entries,
    send_udp,
    status,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess
    from tests.support.namespaces import Namespace

pytestmark = pytest.mark.needs("clang")

_TAG = b"lm"
"""In the padding of what lazymesh writes into Cilium's maps."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab; each test names peers of its own."""
    with Lab(pods=2) as built:
        yield built


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A current Cilium with an agent of ours beside it, for all tests that change neither for good."""
    with Lab(pods=1) as lab, Cilium(lab) as cilium, beside_cilium(lab) as agent:
        yield Pair(lab, cilium, agent)


@dataclass
class Pair:
    """Who is on the node."""

    lab: Lab
    cilium: Cilium
    agent: AgentProcess

    @property
    def pod(self) -> Namespace:
        """Where packets come from."""
        return self.lab.pods[0].namespace

    @property
    def owned(self) -> float:
        """How many entries are ours."""
        return metric(self.agent, "lazymesh_entries_owned")


def without_tag(value: bytes) -> bytes:
    """Return a value as Cilium would have written it."""
    return value[:-4] + bytes(2) + value[-2:]


def is_tagged(value: bytes) -> bool:
    """Tell whether lazymesh wrote it."""
    return value[-4:-2] == _TAG


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_entries_are_byte_for_byte_what_cilium_writes(lab: Lab, layout: str) -> None:
    """Endpoint, key, bits for tunnels; none of these for a pod of this very node; our tag aside."""
    records: dict[str, dict[str, Any]] = {
        remote_address(10): {"HostIP": NODE_B[0], "Key": 3},
        remote_address(11): {"HostIP": NODE_B[1], "Key": 255},
        remote_address(12): {"HostIP": NODE_A[0]},
        remote_address(13, 6): {"HostIP": NODE_B[0]},
    }
    for peer, fields in records.items():
        lab.publish(peer, **fields)
    with Cilium(lab, layout=layout) as cilium, beside_cilium(lab):
        for peer in records:
            wait_until(
                lambda peer=peer: bool(connect(lab.pods[0].namespace, peer, 0.3) or peer in cilium.entries()),
                what=peer,
            )
        ours = {key: value for key, value in dump(cilium.pin).items() if is_tagged(value)}
        assert len(ours) == len(records)
        for peer, fields in records.items():
            cilium.upsert(peer, host_ip=fields["HostIP"], key=fields.get("Key", 0))
        theirs = dump(cilium.pin)
        assert {key: without_tag(value) for key, value in ours.items()} == {key: theirs[key] for key in ours}


def test_what_cilium_knows_is_left_to_it(pair: Pair) -> None:
    """Its pods hit; what it writes over ours is its own from then on, and goes when it says so."""
    cilium, peer = pair.cilium, remote_address(20)
    pair.lab.publish(peer)
    assert connect(pair.pod, peer) is not None
    cilium.upsert(peer, identity=OTHER_IDENTITY)
    pair.lab.withdraw(peer)
    time.sleep(0.3)
    assert cilium.entries()[peer].identity == OTHER_IDENTITY, "the record is gone, but the entry is Cilium's"
    before, owned = dump(cilium.pin), pair.owned
    known = remote_address(21)
    cilium.upsert(known)
    assert connect(pair.pod, known) is not None
    assert pair.owned == owned
    cilium.delete(known)
    assert dump(cilium.pin) == before


def test_entries_without_an_identity_or_of_the_world_are_nobodys_business(pair: Pair) -> None:
    """Both are on live nodes (cilium-live 3): identity 0 hits, identity 2 misses and is refused; both stay."""
    zero, world = remote_address(30), remote_address(31)
    for peer, identity in ((zero, 0), (world, 2)):
        pair.cilium.upsert(peer, identity=identity)
        pair.lab.publish(peer, identity=identity)
    before, owned = dump(pair.cilium.pin), pair.owned
    with Misses(pair.lab.socket) as misses:
        assert connect(pair.pod, zero, 0.1) is None
        refused = misses.provoke(pair.pod, world)
        assert (refused["outcome"], refused["reason"]) == ("absent", "forged")
    assert pair.owned == owned
    assert dump(pair.cilium.pin) == before


def test_nothing_is_written_before_the_identity_is_known(pair: Pair) -> None:
    """An entry without it would match no policy; once it is published the entry comes by itself."""
    unknown, peer = SERVER_IDENTITY + 77, remote_address(40)
    pair.cilium.allow(unknown)
    pair.lab.publish(peer, identity=unknown)
    with Misses(pair.lab.socket) as misses:
        assert misses.provoke(pair.pod, peer)["reason"] == "unknown-identity"
    assert peer not in pair.cilium.entries()
    assert any("do not publish their identities" in line for line in status(pair.lab)["wrong"])
    pair.lab.publish_identity(unknown, {"app": "late"})
    wait_until(lambda: peer in pair.cilium.entries(), what="the entry")
    assert connect(pair.pod, peer) is not None


def test_ipcache_command_reads_ciliums_map(pair: Pair) -> None:
    """With an owner for each entry."""
    peer = remote_address(97)
    pair.lab.publish(peer)
    assert connect(pair.pod, peer) is not None
    listed = pair.lab.ipcache()
    assert listed[f"{peer}/32"]["owner"] == "lazymesh"
    assert listed[REMOTE_CIDRS[0]]["owner"] == "other"
    assert pair.lab.cli("ipcache", "get", peer).stdout.rstrip().endswith("owner=lazymesh")


def test_status_shows_the_map(pair: Pair) -> None:
    """With its layout and what it is there for."""
    shown = pair.lab.cli("status", check=False).stdout
    assert f"Ipcache:    map {pair.cilium.map_id} (v2-readonly, pinned)" in shown
    assert "Datapath:   cilium, attached by tcx" in shown
    assert status(pair.lab)["datapath"]["ipcache"]["maps"][0]["size"] == 512_000


def test_programs_remember_nothing_while_packets_may_be_held(pair: Pair) -> None:
    """What Cilium has removed since the last tick goes on as world: right only where misses are passed on, too."""

    def remembers() -> bool:
        (raw,) = raw_entries(pair.lab, "lm_config").values()
        return abi.Config.from_buffer_copy(raw).generation != 0

    for action, expected in (("pass", True), ("hold", False), ("drop", True), ("hold", False)):
        assert pair.lab.cli("config", "on-miss", action).returncode == 0
        assert remembers() is expected
    pair.lab.cli("config", "on-miss", "pass")


def test_shadow_decides_everything_and_writes_nothing(agent: Cilium, lab: Lab) -> None:
    """The map is the same before and after, byte for byte; what would have changed is told and counted."""
    pod, peer, gone = lab.pods[0].namespace, remote_address(60), remote_address(61)
    lab.publish(peer)
    before = dump(agent.pin)
    with beside_cilium(lab, "--shadow") as ours, Misses(lab.socket) as misses:
        would = misses.provoke(pod, peer)
        assert (would["outcome"], would["identity"]) == ("installed", SERVER_IDENTITY)
        assert misses.provoke(pod, gone)["reason"] == "not-found"
        assert connect(pod, peer, 0.2) is None, "verdicts stay as they are"
        shown = status(lab)
        assert (shown["datapath"]["mode"], shown["datapath"]["shadow"]) == ("cilium", True)
        assert shown["entries"]["shadowChanges"] >= 1
        assert metric(ours, "lazymesh_ipcache_entries") == len(agent.entries())
        assert metric(ours, "lazymesh_shadow_changes_total") >= 1
        assert dump(agent.pin) == before
    assert dump(agent.pin) == before


def test_entries_of_a_killed_agent_serve_until_the_next_one_has_confirmed_them(
    agent: Cilium, lab: Lab
) -> None:
    """The programs go on without it; what changed meanwhile is put right. Shadow mode refuses to leave them alone."""
    pod, stays, goes = lab.pods[0].namespace, remote_address(70), remote_address(71)
    lab.publish_many([stays, goes])
    words = options(lab, datapath="cilium", policy=None)
    with launched(lab, *words) as first:
        first.wait_ready()
        assert connect(pod, stays) is not None
        assert connect(pod, goes) is not None
        first.kill()
    assert connect(pod, stays) is not None
    lab.withdraw(goes)
    with launched(lab, *words, "--shadow") as refused:
        assert refused.process.wait(30) == 3
        assert "lazymesh uninstall" in refused.log
    with beside_cilium(lab):
        wait_until(lambda: goes not in agent.entries(), what="the leftover to go")
        assert stays in agent.entries()
    assert stays not in agent.entries()


def test_full_map_is_ciliums(lab: Lab) -> None:
    """Beyond 95 % ours go and no new ones come; an alarm says so, and Cilium's own still fit."""
    pod, peers = lab.pods[0].namespace, [remote_address(80 + number) for number in range(4)]
    lab.publish_many(peers)
    with Cilium(lab, max_entries=100) as cilium, beside_cilium(lab) as ours:
        for peer in peers[:3]:
            assert connect(pod, peer) is not None
        room = 100 - len(cilium.entries())
        assert metric(ours, "lazymesh_entries_owned") == 3
        cilium.upsert_many([f"10.2.9.{number}" for number in range(room - 1)])
        wait_until(lambda: "nearly full" in " ".join(status(lab)["wrong"]), 15, "the alarm")
        wait_until(lambda: not set(peers) & set(cilium.entries()), what="ours to go")
        with Misses(lab.socket) as misses:
            assert misses.provoke(pod, peers[3])["reason"] == "map-full"
        cilium.upsert_many([f"10.2.8.{number}" for number in range(4)])
        assert cilium.log == []
        assert len(cilium.entries()) == 100
        # The kernel itself says no; nobody takes harm.
        send_udp(pod, peers[0], 1)
        assert metric(ours, "lazymesh_entries_owned") == 0
        for number in range(room):
            cilium.delete(f"10.2.9.{number}")
        wait_until(lambda: "nearly full" not in " ".join(status(lab)["wrong"]), 15, "the alarm to end")
        wait_until(lambda: connect(pod, peers[3], 0.5) is not None, 15, "new ones to come again")


def test_full_map_is_ciliums_also_from_what_an_earlier_life_left(lab: Lab) -> None:
    """Its cluster's store is down since: status counts such entries, and they go when room is scarce."""
    pod, peers = lab.pods[0].namespace, [remote_address(85 + number) for number in range(3)]
    lab.publish_many(peers)
    words = options(lab, datapath="cilium", policy=None)
    with Cilium(lab, max_entries=100) as cilium:
        with launched(lab, *words) as first:
            first.wait_ready()
            for peer in peers:
                assert connect(pod, peer) is not None
            first.kill()
        lab.etcd.kill()
        with launched(lab, *words, "--cleanup") as ours:
            ours.wait_ready()
            shown = status(lab)
            assert (shown["entries"]["owned"], shown["entries"]["stale"]) == (3, 3)
            assert "3 entries are kept as last known" in " ".join(shown["wrong"])
            assert metric(ours, "lazymesh_entries_stale", target_cluster="id 2") == 3
            assert connect(pod, peers[0]) is not None
            cilium.upsert(peers[0])
            room = 100 - len(cilium.entries())
            cilium.upsert_many([f"10.2.9.{number}" for number in range(room)])
            wait_until(lambda: not set(peers[1:]) & set(cilium.entries()), 15, "ours to go")
            cilium.upsert_many(["10.2.8.1", "10.2.8.2"])
            assert cilium.log == []
            lab.etcd.start()
            wait_until(lambda: status(lab)["clusters"][0]["state"] == "ready", 30, "the store to be back")
            assert (status(lab)["entries"]["owned"], peers[0] in cilium.entries()) == (0, True)


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_pin_of_another_version_is_not_the_map(lab: Lab, layout: str) -> None:
    """A node that was upgraded, or went back, has both pins; programs tell which one counts."""
    peer = remote_address(90)
    lab.publish(peer)
    with Cilium(lab, layout=layout, upgraded=True) as cilium, beside_cilium(lab):
        assert connect(lab.pods[0].namespace, peer) is not None
        assert peer in cilium.entries()
        assert [one["id"] for one in status(lab)["datapath"]["ipcache"]["maps"]] == [cilium.map_id]


def test_agent_waits_for_a_cilium_that_starts_later(lab: Lab) -> None:
    """As the pods of a node that boots do; and it can be told to stop meanwhile."""
    peer = remote_address(95)
    lab.publish(peer)
    words = options(lab, datapath="cilium", policy=None)
    with launched(lab, *words, "--cleanup") as waiting:
        wait_until(lambda: "waiting for Cilium" in waiting.log, 30, "the agent to wait")
        assert waiting.stop() == 0
    with launched(lab, *words, "--cleanup") as waiting:
        wait_until(lambda: "waiting for Cilium" in waiting.log, 30, "the agent to wait")
        with Misses(lab.socket) as misses, Cilium(lab) as cilium:
            waiting.wait_ready()
            assert misses.provoke(lab.pods[0].namespace, peer)["outcome"] == "installed"
            assert connect(lab.pods[0].namespace, peer) is not None
            assert peer in cilium.entries()
            waiting.stop()


def test_agent_that_waits_for_cilium_is_alive_and_says_so(lab: Lab) -> None:
    """Else a new node's kubelet would kill it again and again, and nobody could ask why."""
    what = f"waiting for Cilium to pin its ipcache in {lab.bpffs}/tc/globals"
    with launched(lab, *options(lab, datapath="cilium", policy=None), "--cleanup") as waiting:
        wait_until(lambda: "waiting for Cilium" in waiting.log, 30, "the agent to wait")
        assert http_status(lab.node_a, METRICS_PORT, "/healthz") == (200, "ok\n")
        assert http_status(lab.node_a, METRICS_PORT, "/readyz") == (503, f"{what}\n")
        assert "lazymesh_build_info" in waiting.get("/metrics")
        screen = lab.cli("status", check=False)
        assert screen.returncode == 1
        assert f"Not ready: {what}\nWRONG: nothing is resolved until Cilium" in screen.stdout
        answer = json.loads(lab.cli("status", "-o", "json", check=False).stdout)
        assert (answer["ready"], answer["notReady"], len(answer["wrong"])) == (False, what, 1)
        for words in (["audit"], ["config", "on-miss", "pass"]):
            refusal = lab.cli(*words, check=False)
            assert (refusal.returncode, refusal.stderr) == (
                3,
                f"lazymesh: the agent is still starting: {what}\n",
            )
        with Cilium(lab):
            waiting.wait_ready()
            assert status(lab)["wrong"] == []
            assert metric(waiting, "lazymesh_interfaces_attached") == 3
            assert waiting.stop() == 0
