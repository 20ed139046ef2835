"""The standalone policy: which packets of mesh peers go on, by the peer's identity and by the flows it allowed before.

The story of most tests: ``send(...)`` a packet, and it passes or is dropped; the counter says for which reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from scapy.packet import Raw

from lazymesh.core.model import Direction, Entry, EntryFlag
from lazymesh.datapath import abi
from tests.support import packets
from tests.support.packets import INTERNET, NODE_B, POD_B1, POD_B2, Flow, Host
from tests.support.prog_run import TC_ACT_SHOT, TC_ACT_UNSPEC

if TYPE_CHECKING:
    from tests.datapath.conftest import Bench

EGRESS, INGRESS = Direction
IDENTITY, OTHER_IDENTITY, WORLD = 131_073, 131_074, 2
ALLOW, REPLY, DENY, FRAGMENT = "policy_allow", "policy_reply", "policy_deny", "policy_fragment"
SECOND = 1_000_000_000
BOTH = [pytest.param(direction, id=direction.name.lower()) for direction in Direction]
VERSIONS = [pytest.param(version, id=f"IPv{version}") for version in (4, 6)]


class Policed:
    """A bench under default deny, with a peer of each identity."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        bench.configure(enforced=frozenset(Direction))
        for version in (4, 6):
            bench.mesh({packets.PODS_OF_B[version]: 2})
            bench.entries(
                {POD_B1.prefix(version): Entry(IDENTITY), POD_B2.prefix(version): Entry(OTHER_IDENTITY)}
            )

    def allow(self, direction: Direction, identity: int = IDENTITY) -> None:
        """Let an identity talk in one direction."""
        self.bench.datapath.policy.apply([(direction, identity)], [])

    def revoke(self, direction: Direction, identity: int = IDENTITY) -> None:
        """Take that back."""
        self.bench.datapath.policy.apply([], [(direction, identity)])

    def judge(self, direction: Direction, frame: bytes) -> str:
        """Send a packet and return the policy counter that moved; checks that the verdict goes with it."""
        self.bench.forget_counts()
        verdict = self.bench.send(direction, frame)
        (cause,) = [name for name in self.bench.counts(direction) if name.startswith("policy_")]
        assert verdict == (TC_ACT_SHOT if cause == DENY else TC_ACT_UNSPEC)
        return cause

    def age_flows(self, seconds: float) -> None:
        """Let time pass for every flow the programs remember."""
        flows = self.bench.maps["lm_flows"]
        for key, raw in list(flows.items()):
            flow = abi.Flow.from_buffer_copy(raw)
            flow.seen_ns -= int(seconds * SECOND)
            flows.update(key, bytes(flow))

    def flows(self) -> int:
        """Return how many flows are remembered."""
        return len(list(self.bench.maps["lm_flows"].items()))


@pytest.fixture
def policed(bench: Bench) -> Policed:
    """Return a datapath that denies what is not allowed, both ways."""
    return Policed(bench)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", BOTH)
class TestIdentity:
    """Who the peer is decides."""

    def test_unknown_to_the_policy_is_denied(
        self, policed: Policed, direction: Direction, version: int
    ) -> None:
        """Default deny."""
        assert policed.judge(direction, Flow(POD_B1, direction, version).udp()) == DENY

    def test_allowed_identity_passes_and_others_do_not(
        self, policed: Policed, direction: Direction, version: int
    ) -> None:
        """An element of the policy map allows one identity, not its neighbour."""
        policed.allow(direction)
        assert policed.judge(direction, Flow(POD_B1, direction, version).udp()) == ALLOW
        assert policed.judge(direction, Flow(POD_B2, direction, version).udp()) == DENY

    def test_allowed_the_other_way_is_not_allowed(
        self, policed: Policed, direction: Direction, version: int
    ) -> None:
        """May it talk to us is not may we talk to it."""
        policed.allow(Direction(1 - direction))
        assert policed.judge(direction, Flow(POD_B1, direction, version).udp()) == DENY

    def test_revoked_identity_is_denied(self, policed: Policed, direction: Direction, version: int) -> None:
        """At once, also in the middle of a flow."""
        frame = Flow(POD_B1, direction, version).tcp("A")
        policed.allow(direction)
        assert policed.judge(direction, frame) == ALLOW
        policed.revoke(direction)
        assert policed.judge(direction, frame) == DENY

    @pytest.mark.parametrize("world", [None, 2, 9, 10, 0x0100_0001], ids=str)
    def test_peer_that_missed_is_judged_as_world(
        self, policed: Policed, world: int | None, direction: Direction, version: int
    ) -> None:
        """Without an identity of its own a mesh peer is world, identity 2, whatever answered the lookup."""
        policed.bench.ipcache.delete(POD_B1.address(version))
        if world is not None:
            policed.bench.entries({packets.NODE_PODS_OF_B[version]: Entry(world)})
        frame = Flow(POD_B1, direction, version).udp()
        assert policed.judge(direction, frame) == DENY
        policed.allow(direction, WORLD)
        assert policed.judge(direction, frame) == ALLOW

    def test_traffic_outside_the_mesh_is_not_judged(
        self, policed: Policed, direction: Direction, version: int
    ) -> None:
        """Neither world behind the default route, nor another writer's entry, nor a tunnel's CIDR."""
        bench = policed.bench
        bench.mesh({packets.PODS_OF_B[version]: 2})
        tunnelled = Entry(2, NODE_B.address(4), 0, EntryFlag.HAS_TUNNEL_EP)
        for found in (Entry(2), Entry(IDENTITY), Entry(0x0100_0001), tunnelled):
            bench.entries({INTERNET.prefix(version): found})
            assert bench.send(direction, Flow(INTERNET, direction, version).udp()) == TC_ACT_UNSPEC
        assert not any(name.startswith("policy_") for name in bench.counts(direction))

    def test_direction_that_is_not_enforced_passes(
        self, policed: Policed, direction: Direction, version: int
    ) -> None:
        """Each direction has its own switch."""
        policed.bench.configure(enforced=frozenset({Direction(1 - direction)}))
        assert policed.judge(direction, Flow(POD_B1, direction, version).udp()) == ALLOW

    def test_without_a_policy_nothing_is_judged_or_remembered(
        self, policed: Policed, direction: Direction, version: int
    ) -> None:
        """Beside Cilium the flow table stays empty."""
        policed.bench.configure()
        for frame in (Flow(POD_B1, direction, version).tcp(), Flow(POD_B1, direction, version).udp()):
            assert policed.bench.send(direction, frame) == TC_ACT_UNSPEC
        assert policed.bench.counts(direction) == {"hit": 2}
        assert policed.flows() == 0

    def test_identity_zero_is_no_wildcard(self, policed: Policed, direction: Direction, version: int) -> None:
        """A broken entry is allowed only by a policy that allows identity 0, and none does."""
        policed.allow(direction, WORLD)
        policed.bench.entries({POD_B1.prefix(version): Entry(0)})
        assert policed.judge(direction, Flow(POD_B1, direction, version).udp()) == DENY


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("initiator", BOTH)
class TestReplies:
    """Answers of an allowed flow pass though their direction is denied."""

    @pytest.mark.parametrize("kind", ["udp", "tcp"])
    def test_answers_of_an_allowed_flow_pass(
        self, policed: Policed, kind: str, initiator: Direction, version: int
    ) -> None:
        """And only after its first packet, and only with exactly its ports turned round."""
        policed.allow(initiator)
        there = Flow(POD_B1, initiator, version)
        back = there.back()
        send = getattr(Flow, kind)
        assert policed.judge(back.direction, send(back)) == DENY
        assert policed.judge(initiator, send(there)) == ALLOW
        assert policed.judge(back.direction, send(back)) == REPLY
        for other in (
            replace(back, pod_port=1),
            replace(back, peer_port=1),
            replace(back, pod=packets.POD_A2),
            replace(back, peer=POD_B2),
        ):
            assert policed.judge(back.direction, send(other)) == DENY
        assert policed.judge(back.direction, getattr(Flow, "udp" if kind == "tcp" else "tcp")(back)) == DENY

    def test_echo_replies_pass_and_requests_do_not(
        self, policed: Policed, initiator: Direction, version: int
    ) -> None:
        """Pinging a peer does not entitle it to ping us, not even with the same identifier."""
        policed.allow(initiator)
        there = Flow(POD_B1, initiator, version)
        back = there.back()
        assert policed.judge(back.direction, back.echo_reply(7)) == DENY
        assert policed.judge(initiator, there.echo(7)) == ALLOW
        assert policed.judge(back.direction, back.echo_reply(7)) == REPLY
        assert policed.judge(back.direction, back.echo_reply(8)) == DENY
        assert policed.judge(back.direction, back.echo(7)) == DENY

    def test_echo_reply_opens_nothing(self, policed: Policed, initiator: Direction, version: int) -> None:
        """An allowed but unsolicited answer does not allow requests."""
        policed.allow(initiator)
        there = Flow(POD_B1, initiator, version)
        assert policed.judge(initiator, there.echo_reply()) == ALLOW
        assert policed.flows() == 0

    def test_answers_end_with_the_denial_of_the_flow(
        self, policed: Policed, initiator: Direction, version: int
    ) -> None:
        """Once a packet of the flow itself is denied, what answers it is denied too."""
        policed.allow(initiator)
        there = Flow(POD_B1, initiator, version)
        back = there.back()
        assert policed.judge(initiator, there.tcp("S")) == ALLOW
        assert policed.judge(back.direction, back.tcp("SA")) == REPLY
        policed.revoke(initiator)
        assert policed.judge(initiator, there.tcp("A")) == DENY
        assert policed.judge(back.direction, back.tcp("A")) == DENY

    def test_answers_pass_whoever_the_peer_has_become(
        self, policed: Policed, initiator: Direction, version: int
    ) -> None:
        """A flow allowed as world continues when the peer's entry arrives, as long as its own direction is allowed."""
        bench = policed.bench
        bench.ipcache.delete(POD_B1.address(version))
        policed.allow(initiator, WORLD)
        there = Flow(POD_B1, initiator, version)
        assert policed.judge(initiator, there.tcp("S")) == ALLOW
        bench.entries({POD_B1.prefix(version): Entry(IDENTITY)})
        assert policed.judge(there.back().direction, there.back().tcp("SA")) == REPLY
        assert policed.judge(initiator, there.tcp("A")) == DENY

    def test_flow_allowed_both_ways_is_one_flow(
        self, policed: Policed, initiator: Direction, version: int
    ) -> None:
        """Answers make no flow of their own."""
        policed.allow(EGRESS)
        policed.allow(INGRESS)
        there = Flow(POD_B1, initiator, version)
        assert policed.judge(initiator, there.tcp("S")) == ALLOW
        assert policed.judge(there.back().direction, there.back().tcp("SA")) == REPLY
        assert policed.judge(initiator, there.tcp("A")) == ALLOW
        assert policed.flows() == 1

    @pytest.mark.parametrize(("kind", "seconds"), [("udp", 60), ("tcp", 8_000), ("echo", 60)])
    def test_idle_flow_is_forgotten(
        self, policed: Policed, kind: str, seconds: int, initiator: Direction, version: int
    ) -> None:
        """After its lifetime an answer is an unknown packet; the flow's next packet starts it again."""
        policed.allow(initiator)
        there = Flow(POD_B1, initiator, version)
        answer = getattr(Flow, "echo_reply" if kind == "echo" else kind)(there.back())
        back = there.back().direction
        ask = getattr(Flow, kind)(there)
        assert policed.judge(initiator, ask) == ALLOW
        policed.age_flows(seconds - 5)
        assert policed.judge(back, answer) == REPLY
        policed.age_flows(seconds - 5)
        assert policed.judge(back, answer) == REPLY, "an answer keeps a flow alive"
        policed.age_flows(seconds + 1)
        assert policed.judge(back, answer) == DENY
        assert policed.judge(initiator, ask) == ALLOW
        assert policed.judge(back, answer) == REPLY


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("initiator", BOTH)
class TestClosing:
    """A TCP connection that is over is forgotten soon."""

    @pytest.fixture
    def there(self, policed: Policed, initiator: Direction, version: int) -> Flow:
        """Return an open connection."""
        policed.allow(initiator)
        flow = Flow(POD_B1, initiator, version)
        policed.judge(initiator, flow.tcp("S"))
        policed.judge(flow.back().direction, flow.back().tcp("SA"))
        policed.judge(initiator, flow.tcp("A"))
        return flow

    def test_reset_ends_it(self, policed: Policed, there: Flow) -> None:
        """By either side, within ten seconds."""
        for side in (there, there.back()):
            policed.judge(there.direction, there.tcp("S"))
            policed.judge(side.direction, side.tcp("RA"))
            assert policed.judge(there.back().direction, there.back().tcp("A")) == REPLY
            policed.age_flows(11)
            assert policed.judge(there.back().direction, there.back().tcp("A")) == DENY

    def test_both_fins_end_it_and_the_last_ack_does_not_revive_it(
        self, policed: Policed, there: Flow
    ) -> None:
        """The ACK of the second FIN comes without FIN; it must not turn a closed flow into an open one."""
        back = there.back()
        policed.judge(there.direction, there.tcp("FA"))
        policed.judge(back.direction, back.tcp("FA"))
        assert policed.judge(there.direction, there.tcp("A")) == ALLOW
        policed.age_flows(11)
        assert policed.judge(back.direction, back.tcp("A")) == DENY

    def test_half_closed_connection_stays_open(self, policed: Policed, there: Flow) -> None:
        """Who has said all may still be listening: a slow answer after one FIN passes."""
        back = there.back()
        policed.judge(there.direction, there.tcp("FA"))
        policed.age_flows(600)
        assert policed.judge(back.direction, back.tcp("PA", b"late")) == REPLY
        assert policed.judge(there.direction, there.tcp("A")) == ALLOW
        policed.age_flows(600)
        assert policed.judge(back.direction, back.tcp("FA")) == REPLY
        policed.age_flows(11)
        assert policed.judge(back.direction, back.tcp("A")) == DENY

    def test_closed_connection_is_not_kept_alive(self, policed: Policed, there: Flow) -> None:
        """A peer that keeps sending after the end gains no time by it."""
        back = there.back()
        policed.judge(there.direction, there.tcp("R"))
        policed.age_flows(6)
        assert policed.judge(back.direction, back.tcp("A")) == REPLY
        policed.age_flows(6)
        assert policed.judge(back.direction, back.tcp("A")) == DENY

    def test_connection_that_goes_on_after_its_end_is_a_new_one(self, policed: Policed, there: Flow) -> None:
        """Somebody's reset was a forgery, say: the next packet of the allowed side starts it again."""
        back = there.back()
        policed.judge(back.direction, back.tcp("RA"))
        policed.age_flows(11)
        assert policed.judge(back.direction, back.tcp("A")) == DENY
        assert policed.judge(there.direction, there.tcp("A")) == ALLOW
        policed.age_flows(600)
        assert policed.judge(back.direction, back.tcp("A")) == REPLY

    def test_first_packet_may_be_the_last(self, policed: Policed, there: Flow) -> None:
        """Of a connection that was there before the policy: a reset opens no flow of hours."""
        there = replace(there, pod_port=there.pod_port + 1)
        assert policed.judge(there.direction, there.tcp("RA")) == ALLOW
        assert policed.judge(there.back().direction, there.back().tcp("A")) == REPLY
        policed.age_flows(11)
        assert policed.judge(there.back().direction, there.back().tcp("A")) == DENY

    def test_same_ports_may_be_used_again(self, policed: Policed, there: Flow) -> None:
        """A SYN on the ports of a closed connection starts a new one with its full lifetime."""
        back = there.back()
        policed.judge(there.direction, there.tcp("FA"))
        policed.judge(back.direction, back.tcp("FA"))
        assert policed.judge(there.direction, there.tcp("S")) == ALLOW
        policed.age_flows(600)
        assert policed.judge(back.direction, back.tcp("SA")) == REPLY


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", BOTH)
def test_later_fragments_pass_with_their_first(policed: Policed, direction: Direction, version: int) -> None:
    """They carry no ports; without the first, which is judged, they are never put together."""
    flow = Flow(POD_B1, direction, version)
    assert policed.judge(direction, flow.first_fragment()) == DENY
    assert policed.judge(direction, flow.later_fragment()) == FRAGMENT
    policed.allow(direction)
    assert policed.judge(direction, flow.first_fragment()) == ALLOW
    assert policed.judge(direction, flow.later_fragment()) == ALLOW
    assert policed.flows() == 1
    back = flow.back()
    assert policed.judge(back.direction, back.first_fragment()) == REPLY
    assert policed.judge(back.direction, back.later_fragment()) == FRAGMENT


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("offset", [1, 256, 4_096, 8_191])
def test_fragment_with_any_offset_has_no_ports(policed: Policed, offset: int, version: int) -> None:
    """What stands where the ports would be is payload, and its sender chose it."""
    policed.allow(EGRESS)
    there = Flow(POD_B1, EGRESS, version)
    assert policed.judge(EGRESS, there.udp()) == ALLOW
    payload = Raw(there.back().udp()[34 if version == 4 else 54 :])
    piece = there.back()._fragment(offset, more=False, payload=payload)
    assert policed.judge(INGRESS, piece) == FRAGMENT


@pytest.mark.parametrize("direction", BOTH)
def test_reserved_bits_of_a_fragment_header_move_no_ports(policed: Policed, direction: Direction) -> None:
    """In other extension headers the length stands there; this one has always eight bytes."""
    policed.allow(direction)
    flow = Flow(POD_B1, direction, version=6)
    frame = bytearray(flow.first_fragment())
    frame[14 + 40 + 1] = 0xFF
    assert policed.judge(direction, bytes(frame)) == ALLOW
    assert policed.judge(flow.back().direction, flow.back().udp()) == REPLY


def test_flows_of_both_families_are_apart(policed: Policed) -> None:
    """An IPv6 pair that begins with the bytes of an IPv4 pair is another one."""
    pod, peer = Host("pod", packets.POD_A1.v4, "a01:a4::"), Host("peer", POD_B1.v4, "a02:5::")
    policed.bench.mesh({"a02:5::/64": 2})
    policed.bench.entries({peer.prefix(6): Entry(OTHER_IDENTITY)})
    policed.allow(EGRESS)
    there, twin = (Flow(peer, EGRESS, version, pod=pod) for version in (4, 6))
    assert policed.judge(EGRESS, there.udp()) == ALLOW
    assert policed.judge(INGRESS, twin.back().udp()) == DENY
    assert policed.judge(INGRESS, there.back().udp()) == REPLY


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("options", ["ip_options", "longest_header"])
def test_ports_are_found_behind_ip_options(policed: Policed, options: str, direction: Direction) -> None:
    """The length of an IPv4 header is what it says, not twenty bytes."""
    policed.allow(direction)
    flow = Flow(POD_B1, direction)
    answer = flow.back().tcp("SA") if options == "longest_header" else flow.back().udp()
    assert policed.judge(direction, getattr(flow, options)()) == ALLOW
    assert policed.judge(flow.back().direction, answer) == REPLY


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("length", range(1, 6))
def test_ports_are_found_behind_extension_headers(
    policed: Policed, length: int, direction: Direction
) -> None:
    """Answers to a flow with hop-by-hop, routing and destination options pass like any."""
    policed.allow(direction)
    flow = Flow(POD_B1, direction, version=6)
    frame = flow.extensions(*packets.extension_chain(length), flags="S")
    assert policed.judge(direction, frame) == ALLOW
    assert policed.judge(flow.back().direction, flow.back().tcp("SA")) == REPLY


@pytest.mark.parametrize("length", [6, 8])
@pytest.mark.parametrize("direction", BOTH)
def test_endless_extension_headers_are_judged_by_identity_alone(
    policed: Policed, direction: Direction, length: int
) -> None:
    """We stop reading after a few: such a packet is denied or allowed, and opens no flow."""
    flow = Flow(POD_B1, direction, version=6)
    frame = flow.extensions(*packets.extension_chain(length), flags="S")
    assert policed.judge(direction, frame) == DENY
    policed.allow(direction)
    assert policed.judge(direction, frame) == ALLOW
    assert policed.flows() == 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", BOTH)
def test_protocol_without_ports_is_judged_by_identity_alone(
    policed: Policed, direction: Direction, version: int
) -> None:
    """ESP, SCTP and the rest, and ICMP other than echo: allowed or denied, never remembered."""
    flow = Flow(POD_B1, direction, version)
    frames = [packets.of_protocol(flow, number) for number in (50, 132, 47, 255)]
    frames.append(packets.unreachable(flow))
    for frame in frames:
        assert policed.judge(direction, frame) == DENY
    policed.allow(direction)
    for frame in frames:
        assert policed.judge(direction, frame) == ALLOW
    assert policed.flows() == 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
def test_transport_header_cut_short_is_judged_by_identity_alone(
    policed: Policed, kind: str, version: int
) -> None:
    """An IP packet that is whole but too short for its ports is denied like any other."""
    for length in (0, 2, 3):
        frame = packets.with_payload_cut(Flow(version=version), kind, length)
        assert policed.judge(EGRESS, frame) == DENY
    policed.allow(EGRESS)
    assert policed.judge(EGRESS, packets.with_payload_cut(Flow(version=version), kind, 2)) == ALLOW
    assert policed.flows() == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_miss_is_signalled_before_it_is_denied(policed: Policed, version: int) -> None:
    """A denied first packet must still page the entry in, or the peer would stay world forever."""
    policed.bench.ipcache.delete(POD_B1.address(version))
    policed.bench.forget_counts()
    assert policed.bench.send(EGRESS, Flow(version=version).udp()) == TC_ACT_SHOT
    assert policed.bench.counts(EGRESS) == {"missed": 1, "lost": 1, DENY: 1}
