"""Frames as a device delivers them, which a test run cannot make: untagged by the kernel, cut to shreds, in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazymesh.core.model import Direction, Entry
from lazymesh.datapath.settingsmap import OnMiss
from tests.support import packets
from tests.support.packets import POD_B1, POD_B2, Flow
from tests.support.prog_run import Tap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.datapath.conftest import Bench
    from tests.support.namespaces import Namespace

MISS = {"missed": 1, "lost": 1}
NOT_PARSED = {"not_parsed": 1}
DENY = {"policy_deny": 1}


@pytest.fixture
def tap(bench: Bench, node: Namespace) -> Iterator[Tap]:
    """Return a device whose received frames go through the program for pods; every address is in the mesh."""
    bench.mesh({packets.WORLD[4]: 2, packets.WORLD[6]: 2})
    with Tap(node, bench.datapath.pins.path("lm_from_pod")) as device:
        yield device


@pytest.mark.parametrize("version", [4, 6])
def test_frames_without_a_whole_header_pass(bench: Bench, tap: Tap, version: int) -> None:
    """Not even an address to look up: none of our business, under any setting."""
    frames = packets.headless(Flow(version=version)).values()
    for settings in ({}, {"on_miss": OnMiss.DROP}, {"enforced": frozenset(Direction)}):
        bench.forget_counts()
        bench.configure(**settings)
        for frame in frames:
            tap.receive(frame)
        assert bench.counts(Direction.EGRESS) == {"not_parsed": len(frames)}


@pytest.mark.parametrize("enforced", [frozenset(), frozenset(Direction)], ids=["no policy", "policy"])
@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(Flow().vlan(5), id="one tag"),
        pytest.param(Flow().vlan(5, outer=0x88A8), id="an 802.1ad tag"),
        pytest.param(Flow().vlan(5, 6), id="two tags"),
        pytest.param(Flow().vlan(5, 0), id="a priority tag inside"),
        pytest.param(Flow(version=6).vlan(4_095), id="the highest tag, IPv6"),
    ],
)
def test_tagged_frames_pass(bench: Bench, tap: Tap, frame: bytes, enforced: frozenset[Direction]) -> None:
    """A VLAN has its own device and addresses; its packets neither miss nor are judged."""
    bench.configure(enforced=enforced)
    tap.receive(frame)
    assert bench.counts(Direction.EGRESS) == NOT_PARSED


@pytest.mark.parametrize("version", [4, 6])
def test_priority_tag_changes_nothing(bench: Bench, tap: Tap, version: int) -> None:
    """The kernel delivers a frame tagged with VLAN id 0 as if it had no tag, so it is read as if it had none."""
    tap.receive(Flow(version=version).vlan(0))
    assert bench.counts(Direction.EGRESS) == MISS


def test_priority_tag_is_no_way_around_policy(bench: Bench, tap: Tap) -> None:
    """One tag of id 0 is judged like none; tags behind it, which the kernel takes off later, are refused."""
    bench.configure(enforced=frozenset({Direction.EGRESS}), rearm_s=0)
    tap.receive(Flow().vlan(0))
    assert bench.counts(Direction.EGRESS) == MISS | DENY
    for tags in ((0, 0), (0, 0, 0), (0, 5)):
        bench.forget_counts()
        tap.receive(Flow().vlan(*tags))
        assert bench.counts(Direction.EGRESS) == NOT_PARSED | DENY
    bench.forget_counts()
    tap.receive(Flow().vlan(0, 0, outer=0x88A8))
    assert bench.counts(Direction.EGRESS) == NOT_PARSED | DENY


def test_priority_of_a_priority_tag_is_no_way_around_policy(bench: Bench, tap: Tap) -> None:
    """The bits beside its id say how urgent a frame is, not whose; which kind of tag follows is the same."""
    bench.configure(enforced=frozenset({Direction.EGRESS}), rearm_s=0)
    plain = Flow().udp()
    for bits in (0x1000, 0x2000, 0xE000, 0xF000):
        bench.forget_counts()
        tap.receive(plain[:12] + b"\x81\x00" + bits.to_bytes(2, "big") + plain[12:])
        assert bench.counts(Direction.EGRESS) == MISS | DENY
    bench.forget_counts()
    tap.receive(plain[:12] + b"\x81\x00\x00\x00\x88\xa8\x00\x00" + plain[12:])
    assert bench.counts(Direction.EGRESS) == NOT_PARSED | DENY


def test_stacked_priority_tags_pass_where_the_other_direction_alone_has_a_policy(
    bench: Bench, tap: Tap
) -> None:
    """Each direction has its own switch."""
    bench.configure(enforced=frozenset({Direction.INGRESS}))
    tap.receive(Flow().vlan(0, 0))
    assert bench.counts(Direction.EGRESS) == NOT_PARSED


def test_stacked_priority_tags_pass_without_policy(bench: Bench, tap: Tap) -> None:
    """Only a policy has something to get around."""
    tap.receive(Flow().vlan(0, 0))
    assert bench.counts(Direction.EGRESS) == NOT_PARSED


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("linear", [14, 16, 33, 1_000])
def test_headers_in_page_fragments_are_read(bench: Bench, tap: Tap, linear: int, version: int) -> None:
    """A big frame has its headers where the driver put them; the peer's address is found there."""
    bench.entries({POD_B1.prefix(version): Entry(131_073)})
    for peer in (POD_B1, POD_B2):
        tap.receive_in_pieces(Flow(peer, version=version).udp(bytes(60_000)), linear)
    assert bench.counts(Direction.EGRESS) == {"hit": 1} | MISS


@pytest.mark.parametrize("version", [4, 6])
def test_ports_in_page_fragments_are_judged(bench: Bench, tap: Tap, version: int) -> None:
    """Policy needs the ports, which may sit even further back."""
    bench.configure(enforced=frozenset({Direction.INGRESS}))
    bench.entries({POD_B1.prefix(version): Entry(131_073)})
    tap.receive_in_pieces(Flow(version=version).tcp("A", bytes(60_000)), linear=16)
    assert bench.counts(Direction.EGRESS) == {"hit": 1, "policy_allow": 1}
    assert len(list(bench.maps["lm_flows"].items())) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_segments_of_60_kilobytes_hit_and_miss_like_any(bench: Bench, tap: Tap, version: int) -> None:
    """GSO: what the pod's TCP sends is one packet until it leaves the machine."""
    bench.entries({POD_B1.prefix(version): Entry(131_073)})
    for peer in (POD_B1, POD_B2):
        tap.receive_gso(Flow(peer, version=version).tcp("A", bytes(60_000)))
    assert bench.counts(Direction.EGRESS) == {"hit": 1} | MISS
