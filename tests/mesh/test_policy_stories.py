"""The standalone policy at work: who may talk follows the identities, as they come, change and go."""

from __future__ import annotations

import contextlib
import itertools
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import METRICS_PORT, OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.node import (
    Talk,
    connect,
    http_status,
    identity_of,
    launched,
    options,
    packets,
    raw_entries,
    send_udp,
    wait_identity,
)
from tests.support.traffic import EchoServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata:
  name: two-tiers
spec:
  endpointSelector: {}
  egress:
    - toEndpoints:
        - matchLabels:
            k8s:app: server
          matchExpressions:
            - {key: tier, operator: NotIn, values: [internal]}
        - matchExpressions:
            - {key: app, operator: In, values: [cache, queue]}
  ingress:
    - fromEndpoints:
        - matchLabels:
            k8s:app: client
"""
WORLD = """\
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata:
  name: world
spec:
  endpointSelector: {}
  egress:
    - toEntities: [world]
"""
CLIENT, CACHE, INTERNAL, LATE, RELABELLED = 131_080, 131_081, 131_082, 131_083, 131_084
SHORT_S = 0.4
"""Long enough for an answer in the lab, too short for a SYN to be sent again."""
_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab with a few identities and a server in the local pod."""
    with Lab(pods=1) as built, EchoServer(built.pods[0].namespace):
        built.node_b.sysctl({"ipv6/ip_nonlocal_bind": 1})
        built.set_policy(POLICY)
        built.publish_identity(CLIENT, {"app": "client"})
        built.publish_identity(CACHE, {"app": "cache"})
        built.publish_identity(INTERNAL, {"app": "server", "tier": "internal"})
        built.publish_identity(RELABELLED, {"app": "batch"})
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent with the policy in both directions."""
    running = lab.start_agent()
    yield running
    running.stop()


def known(lab: Lab, identity: int, family: int = 4) -> str:
    """Return the address of a new remote pod with this identity, resolved."""
    ip = remote_address(next(_NUMBERS), family)
    lab.publish(ip, identity)
    send_udp(lab.pods[0].namespace, ip, 1)
    wait_identity(lab, ip, identity)
    return ip


def may_be_reached(lab: Lab, identity: int) -> bool:
    """Tell whether the kernel's policy map lets pods talk to an identity."""
    return struct.pack("=II", identity, 0) in raw_entries(lab, "lm_policy")


def reaches(lab: Lab, ip: str) -> bool:
    """Tell whether the pod reaches the address at the first packet."""
    return connect(lab.pods[0].namespace, ip, SHORT_S) is not None


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("identity", "allowed"),
    [
        pytest.param(SERVER_IDENTITY, True, id="app=server"),
        pytest.param(CACHE, True, id="app=cache, by an expression"),
        pytest.param(OTHER_IDENTITY, False, id="app=other"),
        pytest.param(INTERNAL, False, id="app=server, but tier=internal"),
    ],
)
def test_labels_decide_who_is_reached(
    lab: Lab, agent: AgentProcess, identity: int, allowed: bool, family: int
) -> None:
    """Known peers are judged at their first packet."""
    assert reaches(lab, known(lab, identity, family)) is allowed


def test_denied_peer_stays_denied(lab: Lab, agent: AgentProcess) -> None:
    """Resolving is no permission: the packets go on being dropped, and no more signals come."""
    ip = known(lab, OTHER_IDENTITY)
    signals, denied = packets(agent, "signalled"), packets(agent, "policy_deny")
    assert connect(lab.pods[0].namespace, ip, 1.3) is None
    assert packets(agent, "policy_deny") >= denied + 2
    assert packets(agent, "signalled") == signals


@pytest.mark.parametrize("family", [4, 6])
def test_ingress_lets_clients_in_and_their_replies_out(lab: Lab, agent: AgentProcess, family: int) -> None:
    """Clients may come in though the pod may not call them; others may not."""
    pod = lab.pods[0]
    target = pod.ipv4 if family == 4 else pod.ipv6
    client, other = known(lab, CLIENT, family), known(lab, OTHER_IDENTITY, family)
    replies = packets(agent, "policy_reply", "egress")
    assert connect(lab.node_b, target, SHORT_S, source=client) is not None
    assert packets(agent, "policy_reply", "egress") > replies
    assert connect(lab.node_b, target, SHORT_S, source=other) is None
    assert not reaches(lab, client), "the pod itself may not call a client"


def test_identity_whose_labels_come_after_its_address(lab: Lab, agent: AgentProcess) -> None:
    """An entry is installed only once the policy knows the identity; then without another packet."""
    ip = remote_address(next(_NUMBERS))
    lab.publish(ip, LATE)
    assert not reaches(lab, ip)
    assert identity_of(lab, ip) is None
    lab.publish_identity(LATE, {"app": "server"})
    assert wait_identity(lab, ip, LATE) < 1
    assert reaches(lab, ip)


def test_selector_follows_an_identity_that_is_relabelled(lab: Lab, agent: AgentProcess) -> None:
    """The same number gets other labels: allowed within a second, and denied again."""
    ip = known(lab, RELABELLED)
    assert not reaches(lab, ip)
    lab.publish_identity(RELABELLED, {"app": "queue"})
    wait_until(lambda: reaches(lab, ip), 1, "the relabelled peer allowed")
    with Talk(lab.pods[0].namespace, ip) as talk:
        assert talk.say()
        lab.publish_identity(RELABELLED, {"app": "batch"})
        wait_until(lambda: not talk.say(0.2), 2, "the running flow cut")
    assert not reaches(lab, ip)


def test_withdrawn_identity_loses_its_entries_and_its_rights(lab: Lab, agent: AgentProcess) -> None:
    """Nothing is left that a later owner of the number could inherit."""
    number = 131_090
    lab.publish_identity(number, {"app": "server"})
    ip = known(lab, number)
    assert reaches(lab, ip)
    lab.withdraw_identity(number)
    assert wait_identity(lab, ip, None) < 1
    assert not reaches(lab, ip)


def test_world_in_a_mesh_cidr_is_denied_unless_allowed(lab: Lab, agent: AgentProcess) -> None:
    """An address nobody publishes is world: denied by this policy. The node's other traffic is not touched."""
    assert not reaches(lab, remote_address(next(_NUMBERS)))
    lab.node_b.ip(["addr replace 203.0.113.1/32 dev lo"])
    lab.node_a.ip(["route replace 203.0.113.1/32 via 192.168.100.2"])
    assert connect(lab.pods[0].namespace, "203.0.113.1", SHORT_S) is not None, "no mesh traffic, no policy"


def test_world_allowed_lets_unresolved_peers_through(lab: Lab) -> None:
    """With toEntities world the first packet passes; once resolved, the labels decide."""
    with Lab(pods=1) as open_lab:
        open_lab.set_policy(POLICY + WORLD)
        open_lab.start_agent()
        server, other = (remote_address(number) for number in range(2))
        open_lab.publish(server)
        open_lab.publish(other, OTHER_IDENTITY)
        first = connect(open_lab.pods[0].namespace, server, SHORT_S)
        assert first is not None, "world is allowed, so no SYN is lost"
        wait_identity(open_lab, server, SERVER_IDENTITY)
        connect(open_lab.pods[0].namespace, other, SHORT_S)
        wait_identity(open_lab, other, OTHER_IDENTITY)
        assert not reaches(open_lab, other), "denied by its labels now"


def test_without_a_policy_nothing_is_denied_and_misses_are_resolved() -> None:
    """The agent of somebody who only wants the entries."""
    with Lab(pods=1) as plain:
        ip = remote_address(0)
        plain.publish(ip, OTHER_IDENTITY)
        with launched(plain, *options(plain, policy=None)) as agent:
            agent.wait_ready()
            assert connect(plain.pods[0].namespace, ip, SHORT_S) is not None
            wait_identity(plain, ip, OTHER_IDENTITY)
            assert packets(agent, "policy_deny") == packets(agent, "policy_allow") == 0


def test_rights_of_an_earlier_life_do_not_outlast_new_labels() -> None:
    """Relabelled while no agent ran: denied as soon as it is told, though another cluster is never listed."""
    with Lab(pods=1) as own:
        own.set_policy(POLICY)
        own.publish_identity(RELABELLED, {"app": "queue"})
        agent = own.start_agent()
        ip, server = known(own, RELABELLED), known(own, SERVER_IDENTITY)
        assert reaches(own, ip)
        agent.kill()
        assert reaches(own, ip), "the kernel goes on"
        own.publish_identity(RELABELLED, {"app": "batch"})
        (own.config / "dead").write_text("endpoints: ['http://127.0.0.1:1']\n")
        own.start_agent()
        assert identity_of(own, ip) == RELABELLED
        assert not reaches(own, ip)
        assert reaches(own, server)


def test_policy_that_only_looks_different_takes_no_rights() -> None:
    """A comment more, while the cluster's store is away: nobody could be judged anew."""
    with Lab(pods=1) as own:
        own.set_policy(POLICY)
        agent = own.start_agent()
        server = known(own, SERVER_IDENTITY)
        agent.stop()
        own.etcd.stop()
        own.set_policy("# a comment\n" + POLICY)
        own.start_agent()
        assert reaches(own, server)


def test_rights_of_a_policy_that_was_only_tried_do_not_outlive_it() -> None:
    """Its agent dies before its programs are loaded, and the one with the old policy finds no store."""
    with Lab(pods=1) as own:
        own.set_policy(POLICY)
        agent = own.start_agent()
        other = known(own, OTHER_IDENTITY)
        assert not reaches(own, other)
        agent.stop()
        tried = own.directory / "tried.yaml"
        tried.write_text(POLICY.replace("k8s:app: server", "k8s:app: other"), encoding="ascii")
        words = options(own, policy=str(tried))
        with launched(own, *words, env={"LAZYMESH_PROGRAM_CACHE": "off"}) as second:
            wait_until(lambda: may_be_reached(own, OTHER_IDENTITY), 60, "rights by the policy that is tried")
            second.kill()
        own.etcd.stop()
        own.start_agent()
        assert not may_be_reached(own, OTHER_IDENTITY)
        assert not reaches(own, other)


def test_policy_that_is_taken_away_denies_nobody_on_its_way() -> None:
    """From its agent's last moment to the next agent's first, with the programs to be compiled in between."""
    with Lab(pods=1) as own:
        own.set_policy(POLICY)
        agent = own.start_agent()
        server = known(own, SERVER_IDENTITY)
        assert reaches(own, server)
        denied = packets(agent, "policy_deny")
        agent.stop()

        def send_until_ready() -> bool:
            send_udp(own.pods[0].namespace, server, 1)
            with contextlib.suppress(OSError):
                return http_status(own.node_a, METRICS_PORT, "/readyz")[0] == 200
            return False

        with launched(own, *options(own, policy=None), env={"LAZYMESH_PROGRAM_CACHE": "off"}) as second:
            wait_until(send_until_ready, 60, "ready")
            assert packets(second, "policy_deny") == denied
