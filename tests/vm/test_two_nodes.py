"""Two nodes on a network of their own, one cluster each: an agent, an etcd and pods on either."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import BOTH_WAYS, Cluster, Store
from tests.support.node import metric
from tests.support.traffic import Exchange, Probe
from tests.vm.conftest import KERNEL, STORY_PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.vm.conftest import Machine

pytestmark = pytest.mark.patience(STORY_PATIENCE_S)

ETCD_PORT = 2379
HELD_MS = 5000
"""Emulated processors may need longer for an answer than a packet is usually held."""
DENIED_S = 3.3
"""Three SYNs."""

ATTACHED = """\
python3 - <<'END'
from tests.support.bpfobject import program_info_by_id
from tests.support.tcx import filters, tcx_programs
print(*[one.name for device in ("lxc0", "eth1") for one in filters(device)])
print(*[program_info_by_id(one).name for device in ("lxc0", "eth1") for one in tcx_programs(device)])
END
"""
"""The distribution's bpftool knows no tcx."""

NODE = """\
sysctl -q net.ipv4.ip_forward=1
ip netns add pod
ip link add lxc0 type veth peer name eth0 netns pod
ip link set lxc0 up
ip addr add 169.254.1.1/32 dev lxc0
ip route add {pods} dev lxc0
ip route add {their_pods} via {their_address}
ip -n pod link set lo up
ip -n pod link set eth0 up
ip -n pod addr add {pod}/32 dev eth0
ip -n pod route add local {pods} dev lo
ip -n pod route add 169.254.1.1 dev eth0
ip -n pod route add default via 169.254.1.1
systemd-run --quiet --unit server ip netns exec pod python3 -I $PWD/tests/support/traffic.py serve 7777
systemd-run --quiet --unit store etcd --data-dir /run/store \\
	--listen-client-urls http://0.0.0.0:{port} --advertise-client-urls http://{address}:{port}
"""
AGENT = """\
mkdir -p /run/mesh
printf 'endpoints:\\n- http://{their_address}:{port}\\n' >/run/mesh/{them}
cat >/run/policy.yaml <<'END'
{policy}END
mkdir -p /tmp/lazymesh-tests
systemd-run --quiet --unit lazymesh --setenv LAZYMESH_PROGRAM_CACHE=/tmp/lazymesh-tests/programs.json \\
	lazymesh agent --datapath standalone --interface lxc+ --uplink eth1 \\
	--clustermesh-config /run/mesh --cluster-name {us} --cluster-id {number} --policy /run/policy.yaml \\
	--hold-timeout {held} --ipcache-size 20000
"""
"""With the programs that the stories' agents have compiled, if they ran before: that takes minutes on a busy host."""


class Node(Cluster):
    """A machine that is a cluster of its own: pods at each address of its CIDR, an etcd, an agent."""

    def __init__(self, machine: Machine, number: int) -> None:
        pods = f"10.{number}.0.0/24"
        super().__init__(machine.name, number, (pods, None), (machine.address, f"fd00:56::{number}"))
        self.machine, self.number = machine, number
        self.pods, self.address = pods, machine.address
        self.store = Store(None, ETCD_PORT, machine.reached_at)

    def pod(self, number: int) -> str:
        """Return the address of a pod."""
        return f"10.{self.number}.0.{10 + number}"

    def run(self, script: str, timeout_s: float = 60) -> str:
        """Run a shell script on it as root."""
        return self.machine.run(script, timeout_s)

    def begin(self, other: Node) -> None:
        """Bring up what there is before an agent comes."""
        words = {"pods": self.pods, "their_pods": other.pods, "pod": self.pod(0)}
        where = {"address": self.address, "their_address": other.address, "port": ETCD_PORT}
        self.run(NODE.format(**words, **where))
        wait_until(self.answers, 30, f"the etcd of node {self.machine.name}")
        self.publish_cluster()

    def start_agent(self, other: Node) -> None:
        """Start an agent, not waiting for it."""
        names = {"us": self.remote_name, "them": other.remote_name, "number": self.number}
        where = {"their_address": other.address, "port": ETCD_PORT}
        self.run(AGENT.format(policy=BOTH_WAYS, held=HELD_MS, **names, **where))

    def wait_ready(self) -> None:
        """Wait until the agent is."""
        self.run(
            "until curl -sf http://127.0.0.1:9968/readyz; do systemctl -q is-active lazymesh; sleep 0.5; done",
            300,
        )

    def answers(self) -> bool:
        """Tell whether its etcd does."""
        try:
            self.store.get("x")
        except OSError:
            return False
        return True

    def get(self, path: str) -> str:
        """Fetch a page of the agent's."""
        return self.run(f"curl -sf http://127.0.0.1:9968{path}")

    def metric(self, name: str, **labels: str) -> float:
        """Return one of the agent's figures."""
        return metric(self, name, **labels)

    def identities(self) -> dict[str, int]:
        """Return the identity of each entry, by address."""
        listed: dict[str, Any] = json.loads(self.run("lazymesh ipcache list -o json"))
        return {prefix.removesuffix("/32"): entry["identity"] for prefix, entry in listed.items()}

    def connect(self, address: str, source: str, patience_s: float = 20, echoes: int = 10) -> Exchange:
        """Connect a pod to a server, and talk."""
        what = Probe(tcp=(address,), timeout=patience_s, echoes=echoes, source=source)
        words = json.dumps(asdict(what))
        (row,) = json.loads(
            self.run(
                f"ip netns exec pod python3 -I tests/support/traffic.py probe '{words}'", 60 + patience_s * 2
            )
        )
        return Exchange(**row)

    def cluster(self) -> dict[str, Any]:
        """Return what the agent says of the other cluster."""
        (found,) = json.loads(self.run("lazymesh status -o json || true"))["clusters"]
        return dict(found)


@pytest.fixture(scope="module")
def nodes(machines: Mapping[str, Machine]) -> Iterator[tuple[Node, Node]]:
    """Return both, ready, with a server each that the other has never heard of."""
    a, b = Node(machines["a"], 1), Node(machines["b"], 2)
    for one, other in ((a, b), (b, a)):
        one.begin(other)
        one.publish(one.pod(0))
    for one, other in ((a, b), (b, a)):
        one.start_agent(other)
    for one in (a, b):
        one.wait_ready()
    yield a, b
    for one in (a, b):
        one.store.close()


def test_first_packet_of_a_connection_misses_on_both_nodes_and_is_held(nodes: tuple[Node, Node]) -> None:
    """The one does not know the destination, the other not the source; each asks the other's etcd, nothing is lost."""
    a, b = nodes
    assert a.identities() == b.identities() == {}
    exchange = a.connect(b.pod(0), a.pod(0))
    assert (exchange.error, len(exchange.steady_ms)) == (None, 10)
    assert a.identities() == {b.pod(0): b.server}
    assert b.identities() == {a.pod(0): a.server}
    assert a.metric("cilium_ipcache_miss_signal_total", direction="egress") == 1
    assert b.metric("cilium_ipcache_miss_signal_total", direction="ingress") == 1
    for one in nodes:
        assert one.metric("lazymesh_held_packets_total", outcome="held") >= 1
        assert one.metric("lazymesh_released_packets_total", reason="timeout") == 0
        assert one.metric("lazymesh_policy_packets_total", verdict="deny") == 0


def test_programs_are_attached_as_the_kernel_allows(nodes: tuple[Node, Node]) -> None:
    """By tcx links where it has them, by clsact filters elsewhere."""
    for one in nodes:
        filters, links = one.run(ATTACHED).splitlines()
        assert (filters, links)[KERNEL >= (6, 6)].split() == ["lm_from_pod", "lm_from_uplink"]
        assert (filters, links)[KERNEL < (6, 6)] == ""


def test_policy_judges_by_the_identity_that_was_resolved(nodes: tuple[Node, Node]) -> None:
    """A pod that is no server may not be called, and may not call."""
    a, b = nodes
    b.publish(b.pod(1), b.other)
    assert a.connect(b.pod(1), a.pod(0), DENIED_S).error is not None
    assert a.identities()[b.pod(1)] == b.other
    assert a.metric("lazymesh_policy_packets_total", verdict="deny", direction="egress") >= 1
    a.publish(a.pod(1), a.other)
    assert a.connect(b.pod(0), a.pod(1), DENIED_S).error is not None
    assert b.identities()[a.pod(1)] == a.other
    assert b.metric("lazymesh_policy_packets_total", verdict="deny", direction="ingress") >= 1


def test_entry_goes_with_its_record(nodes: tuple[Node, Node]) -> None:
    """The other cluster's word is enough, no packet is needed; and another identity comes the same way."""
    a, b = nodes
    b.publish_many([b.pod(2), b.pod(3)])
    for number in (2, 3):
        assert a.connect(b.pod(number), a.pod(0)).error is None
    b.withdraw(b.pod(2))
    b.publish(b.pod(3), b.other)
    wait_until(lambda: b.pod(2) not in a.identities(), 20, "the entry gone")
    wait_until(lambda: a.identities()[b.pod(3)] == b.other, 20, "the other identity")
    assert a.connect(b.pod(3), a.pod(0), DENIED_S).error is not None


def test_network_that_is_cut_delays_the_news_and_loses_none(nodes: tuple[Node, Node]) -> None:
    """A record goes while nobody can tell; what is known stays, and is right when the network is back."""
    a, b = nodes
    b.publish(b.pod(4))
    assert a.connect(b.pod(4), a.pod(0)).error is None
    with b.machine.cut_off():
        b.withdraw(b.pod(4))
        assert a.connect(b.pod(0), a.pod(0), 2).error is not None
        assert {b.pod(0), b.pod(4)} <= a.identities().keys()
    assert a.connect(b.pod(0), a.pod(0)).error is None
    wait_until(lambda: b.pod(4) not in a.identities(), 60, "the news")


def test_known_peer_does_not_notice_that_its_clusters_etcd_is_dead(nodes: tuple[Node, Node]) -> None:
    """What is open goes on, and new connections come about; a new peer waits for the etcd to come back."""
    a, b = nodes
    b.publish(b.pod(5))
    with ThreadPoolExecutor(1) as pool:
        ping = pool.submit(a.run, f"ip netns exec pod ping -q -c 60 -i 0.2 {b.pod(0)} || true")
        b.run("systemctl kill --signal KILL store")
        wait_until(lambda: a.cluster()["state"] == "silent", 60, "the agent to notice")
        assert a.connect(b.pod(0), a.pod(0)).error is None
        assert a.connect(b.pod(5), a.pod(0), DENIED_S).error is not None
        said = ping.result()
    assert " 0% packet loss" in said, said
    assert b.pod(0) in a.identities()
    assert b.pod(5) not in a.identities()
    b.run("systemctl start store")
    wait_until(lambda: a.connect(b.pod(5), a.pod(0), DENIED_S).error is None, 90, "the new peer")
    assert a.identities()[b.pod(5)] == b.server


def test_uninstall_leaves_nothing_on_either_node(nodes: tuple[Node, Node]) -> None:
    """No pin, no program on any interface, no map; and the agents end in good order."""
    for one in nodes:
        one.run("systemctl stop lazymesh")
        assert "failed" not in one.run("systemctl is-failed lazymesh || true")
        removed = json.loads(one.run("lazymesh uninstall -o json"))
        assert (removed["interfaces"], removed["pins"]) == (["eth1", "lxc0"], True)
        left = one.run(
            "ls -A /sys/fs/bpf; bpftool net show; bpftool prog show; bpftool map show; ip -br link"
        )
        assert "lm_" not in left
        assert "lazymesh" not in left
