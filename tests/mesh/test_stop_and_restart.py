"""The agent ends, well or ill, and comes back: traffic goes on, and nothing untrue survives."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath.libbpf import Map
from lazymesh.roles.mesh import EMPTY_S
from tests.support import tcx
from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.namespaces import stop_process
from tests.support.node import (
    Talk,
    connect,
    delete_entry,
    entries,
    filters,
    identity_of,
    insert_foreign,
    launched,
    metric,
    options,
    pack_key,
    pack_value,
    packets,
    pins,
    raw_entries,
    send_udp,
    status,
    wait_identity,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab for each story: they end and start agents."""
    with Lab(pods=1) as built:
        yield built


def installed(lab: Lab, *numbers: int, identity: int = SERVER_IDENTITY) -> list[str]:
    """Publish remote pods and have them resolved."""
    ips = [remote_address(number) for number in numbers]
    lab.publish_many(ips, identity)
    for ip in ips:
        send_udp(lab.pods[0].namespace, ip, 1)
        wait_identity(lab, ip, identity)
    return ips


IMPORTING = """
import sys, types
from lazymesh.cli import main
class Slow(types.ModuleType):
    def __getattr__(self, name):
        print("importing", flush=True)
        import time
        time.sleep(60)
sys.modules["slow"] = Slow("slow")
main._COMMANDS["agent"] = "slow"
sys.argv = ["lazymesh", "agent"]
main.main()
"""


def test_container_can_be_stopped_while_the_agent_is_imported() -> None:
    """The first process of a pid namespace sees no signal that it does not handle."""
    words = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", IMPORTING]
    outside = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert outside.stdout
        assert outside.stdout.readline() == "importing\n"
        (first,) = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert outside.wait(10) == 128 + signal.SIGTERM
    finally:
        stop_process(outside)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_cleanup_nothing_of_ours_is_left(lab: Lab, number: signal.Signals) -> None:
    """No pin, no filter, no qdisc, no entry, no socket; somebody else's filter stays, with its qdisc."""
    node = lab.node_a
    agent = lab.start_agent("--cleanup")
    installed(lab, 0)
    program = str(lab.bpffs / "lazymesh/lm_from_pod")
    node.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    filter_ = ("tc", "filter", "add", "dev", "eth0", "ingress", "prio", "7", "handle", "1")
    node.run(*filter_, "bpf", "direct-action", "object-pinned", program)
    agent.process.send_signal(number)
    assert agent.process.wait(10) == 0
    assert pins(lab) == []
    assert filters(node) == ["eth0: clsact", "eth0: lm_from_pod"]
    assert node.call(tcx.tcx_programs, "eth0") == []
    assert not lab.socket.exists()
    assert connect(lab.pods[0].namespace, remote_address(1)) is not None, "no policy any more"


@pytest.mark.parametrize(("text", "stays"), [("true", False), ("false", True)])
def test_agent_that_is_marked_when_it_is_stopped_leaves_nothing(lab: Lab, text: str, stays: bool) -> None:
    """The word comes while it runs; one that was taken back is none."""
    mark = lab.directory / "uninstall"
    agent = lab.start_agent("--uninstall-mark", str(mark))
    installed(lab, 0)
    mark.write_text(text)
    assert agent.stop() == 0
    assert [bool(pins(lab)), bool(filters(lab.node_a))] == [stays, stays]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_without_cleanup_traffic_goes_on_with_the_agent_dead(lab: Lab, end: str) -> None:
    """Known peers keep working, old connections and new ones, and policy goes on; unknown ones wait."""
    agent = lab.start_agent()
    (known,) = installed(lab, 0)
    (denied,) = installed(lab, 1, identity=OTHER_IDENTITY)
    lab.publish(remote_address(2))
    with Talk(lab.pods[0].namespace, known) as talk:
        assert talk.say()
        if end == "stop":
            assert agent.stop() == 0
        else:
            agent.kill()
        assert set(entries(lab)) == {known, denied}
        assert "lxc0: lm_from_pod" in filters(lab.node_a)
        assert all(talk.say() for _ in range(20))
        assert connect(lab.pods[0].namespace, known) is not None
        assert connect(lab.pods[0].namespace, denied, 0.4) is None
        assert connect(lab.pods[0].namespace, remote_address(2), 0.4) is None
        lab.start_agent()
        assert talk.say()
        assert connect(lab.pods[0].namespace, remote_address(2)) is not None


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_restarted_agent_adopts_corrects_and_keeps(lab: Lab, end: str) -> None:
    """While it was dead one record was deleted, one address reused, one left alone; strangers' entries stay."""
    agent = lab.start_agent()
    deleted, reused, kept, replaced, vanished = installed(lab, 0, 1, 2, 3, 4)
    if end == "stop":
        agent.stop()
    else:
        agent.kill()
    lab.withdraw(deleted)
    lab.publish(reused, OTHER_IDENTITY)
    delete_entry(lab, pack_key(replaced))
    insert_foreign(lab, pack_key(replaced), pack_value(77))
    delete_entry(lab, pack_key(vanished))
    stranger = pack_key("10.2.99.0", 24)
    insert_foreign(lab, stranger, pack_value(2))
    with Talk(lab.pods[0].namespace, kept) as talk:
        again = lab.start_agent()
        wait_identity(lab, deleted, None)
        wait_identity(lab, reused, OTHER_IDENTITY)
        assert talk.say()
    assert identity_of(lab, kept) == SERVER_IDENTITY
    assert raw_entries(lab)[pack_key(replaced)] == pack_value(77)
    assert stranger in raw_entries(lab)
    assert identity_of(lab, vanished) is None
    assert metric(again, "lazymesh_entries_owned") == 2
    assert sorted(raw_entries(lab, "lm_owned")) == sorted([pack_key(reused), pack_key(kept)])
    # What was adopted is watched like everything else.
    lab.withdraw(kept)
    assert wait_identity(lab, kept, None) < 1
    wait_until(lambda: connect(lab.pods[0].namespace, vanished, 0.4), 5, "the vanished one resolved anew")


def test_more_than_the_budget_of_earlier_lives_is_evicted_at_once(lab: Lab) -> None:
    """As many as fill the journal: the next life's own would find no room there."""
    with launched(lab, *options(lab), "--ipcache-size", "1000") as agent:
        agent.wait_ready()
        (known,) = installed(lab, 0)
        agent.kill()
    ours = [remote_address(number) for number in range(60)]
    for name in ("lm_owned", "lm_ipcache"):
        value = raw_entries(lab, name)[pack_key(known)]
        with contextlib.closing(Map.pinned(lab.bpffs / "lazymesh" / name)) as opened:
            opened.update_many([(pack_key(ip), value) for ip in ours])
    lab.publish_many(ours)
    # Nor does the map grow because a larger one is wanted by now.
    with launched(lab, *options(lab), "--ipcache-size", "2000", "--cleanup") as agent:
        agent.wait_ready()
        assert "made for 1000 entries and keeps that size" in lab.cli("status", check=False).stdout
        assert metric(agent, "lazymesh_entries_evicted_total", reason="budget") == 10
        assert metric(agent, "lazymesh_entries_owned") == 50
        assert len(entries(lab)) == len(raw_entries(lab, "lm_owned")) == 50


def test_entries_of_a_cluster_that_left_meanwhile_are_removed(lab: Lab) -> None:
    """The file of the cluster went while no agent ran; a moment later it is certain that none will come."""
    agent = lab.start_agent()
    installed(lab, 0, 1)
    agent.stop()
    lab.leave_mesh()
    lab.start_agent()
    wait_until(lambda: entries(lab) == {}, EMPTY_S + 5, "the entries gone")
    assert raw_entries(lab, "lm_owned") == {}


def test_agent_that_starts_while_etcd_is_away_keeps_the_known_peers(lab: Lab) -> None:
    """Ready without the cluster; known peers talk on; the store comes back, and all is verified."""
    agent = lab.start_agent()
    kept, deleted = installed(lab, 0, 1)
    agent.stop()
    lab.withdraw(deleted)
    lab.etcd.kill()
    agent = lab.start_agent()
    shown = status(lab)
    assert (shown["clusters"][0]["state"], shown["entries"]["stale"]) == ("silent", 2)
    assert "2 entries are kept as last known: their cluster (id 2)" in " ".join(shown["wrong"])
    assert set(entries(lab)) == {kept, deleted}
    assert connect(lab.pods[0].namespace, kept) is not None, "the policy map was kept too"
    lab.etcd.start()
    wait_identity(lab, deleted, None, 30)
    assert identity_of(lab, kept) == SERVER_IDENTITY
    assert connect(lab.pods[0].namespace, kept) is not None
    wait_until(lambda: status(lab)["entries"]["stale"] == 0, 10, "confirmed entries")
    assert packets(agent, "policy_deny") >= 0


def test_policy_that_changed_over_a_restart_is_in_force(lab: Lab) -> None:
    """What the old policy allowed is denied from the first moment of the new one."""
    agent = lab.start_agent()
    (known,) = installed(lab, 0)
    agent.stop()
    lab.set_policy(lab.policy.read_text().replace("server\n", "nobody\n"))
    lab.start_agent()
    assert connect(lab.pods[0].namespace, known, 0.4) is None
    lab.set_policy(lab.policy.read_text().replace("nobody\n", "server\n"))


def test_second_agent_on_the_node_leaves_the_first_alone(lab: Lab) -> None:
    """It says who holds the node and exits 3; programs, entries, socket and metrics of the first stay."""
    first = lab.start_agent()
    installed(lab, 0)
    wait_until(lambda: "ready after_s" in first.log, 5, "its last word, as both write into one file")
    before = filters(lab.node_a)
    argv = options(lab, socket=str(lab.directory / "other.sock"), metrics_address="off")
    with launched(lab, *argv, "--cleanup") as second:
        assert second.process.wait(20) == 3
        assert len(second.log.strip().splitlines()) == 1
        assert f"another lazymesh agent (process {first.pid}) holds {lab.bpffs}/lazymesh" in second.log
    assert filters(lab.node_a) == before
    assert len(entries(lab)) == 1
    assert status(lab)["ready"] is True
    assert first.process.poll() is None


def test_signal_while_the_datapath_is_being_compiled_cleans_up_too(lab: Lab) -> None:
    """An agent that is stopped before it has really started leaves as little as any other."""
    with launched(lab, *options(lab, program_cache="off"), "--cleanup") as agent:
        wait_until((lab.bpffs / "lazymesh").exists, 10, "the agent at work")
        assert stop_process(agent.process) == 0
    assert pins(lab) == []
    assert filters(lab.node_a) == []
