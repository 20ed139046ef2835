"""One packet in; which verdict, which counter, miss or no miss.

Every row runs in both directions and both IP versions. ``{peer}`` and its like in a row stand for the prefix of that
name in the version at hand. Without a reader of signals each miss is counted as lost: that is how a row recognizes one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.model import Direction, Entry, EntryFlag
from lazymesh.datapath import abi
from lazymesh.datapath.settingsmap import OnMiss
from tests.support import packets
from tests.support.packets import INTERNET, NODE_B, POD_A1, POD_B1, POD_B2, Flow, Host
from tests.support.prog_run import TC_ACT_SHOT, TC_ACT_UNSPEC

if TYPE_CHECKING:
    from tests.datapath.conftest import Bench

IDENTITY = 131_073
"""Of a pod of cluster b, id 2."""
TUNNEL = EntryFlag.HAS_TUNNEL_EP
OTHER_FLAGS = 0xFF & ~TUNNEL

NAMES = {"peer": POD_B1, "sibling": POD_B2, "internet": INTERNET}
CIDRS = {"pods": packets.PODS_OF_B, "node pods": packets.NODE_PODS_OF_B, "everything": packets.WORLD}

HIT = {"hit": 1}
MISS = {"missed": 1, "lost": 1}
NOT_MESH = {"not_mesh": 1}
NOT_PARSED = {"not_parsed": 1}

BOTH = [pytest.param(direction, id=direction.name.lower()) for direction in Direction]
VERSIONS = [pytest.param(version, id=f"IPv{version}") for version in (4, 6)]


def entry(identity: int, flags: int = 0) -> Entry:
    """Return an entry; with the tunnel flag it has the endpoint that goes with it."""
    return Entry(identity, NODE_B.address(4) if flags & TUNNEL else None, 0, flags)


@dataclass(frozen=True)
class Row:
    """What the maps hold, and what becomes of a packet of the peer."""

    description: str
    expected: dict[str, int]
    entries: dict[str, Entry] = field(default_factory=dict)
    mesh: tuple[str, ...] = ("pods",)
    peer: Host = POD_B1


ROWS = [
    Row("no entry at all, in the mesh: a miss", MISS),
    Row("no entry at all, outside the mesh: not ours", NOT_MESH, mesh=()),
    Row("an exact entry is a hit", HIT, {"peer": entry(IDENTITY)}),
    Row("an exact entry is a hit outside the mesh too", HIT, {"peer": entry(IDENTITY)}, mesh=()),
    Row("an exact entry with a tunnel endpoint is a hit", HIT, {"peer": entry(IDENTITY, TUNNEL)}),
    Row("the entry of a sibling does not help", MISS, {"sibling": entry(IDENTITY)}),
    *(
        row
        for number in (2, 9, 10)
        for row in (
            Row(f"world as {number}, in the mesh: a miss", MISS, {"everything": entry(number)}),
            Row(
                f"world as {number}, outside the mesh: not ours", NOT_MESH, {"everything": entry(number)}, ()
            ),
            Row(f"a pod CIDR with a tunnel as {number}: a miss", MISS, {"node pods": entry(number, TUNNEL)}),
            Row(
                f"a pod CIDR with a tunnel as {number}, outside the mesh: still a miss",
                MISS,
                {"node pods": entry(number, TUNNEL)},
                mesh=(),
            ),
            Row(
                f"every flag but the tunnel's as {number}, outside the mesh: not ours",
                NOT_MESH,
                {"node pods": entry(number, OTHER_FLAGS)},
                mesh=(),
            ),
            Row(f"an exact entry as {number}, in the mesh: a miss", MISS, {"peer": entry(number)}),
        )
    ),
    *(
        row
        for number in (0x0100_0001, 0x01FF_FFFF)
        for row in (
            Row(f"CIDR identity {number:#x}, in the mesh: a miss", MISS, {"peer": entry(number)}),
            Row(f"CIDR identity {number:#x}, outside: not ours", NOT_MESH, {"peer": entry(number)}, mesh=()),
            Row(
                f"CIDR identity {number:#x} with a tunnel, outside: not ours",
                NOT_MESH,
                {"peer": entry(number, TUNNEL)},
                mesh=(),
            ),
        )
    ),
    *(
        Row(f"{name} is a hit", HIT, {"peer": entry(number)})
        for name, number in {
            "identity 0": 0,
            "host, identity 1": 1,
            "unmanaged, identity 3": 3,
            "health, identity 4": 4,
            "remote-node, identity 6": 6,
            "ingress, identity 8": 8,
            "identity 11": 11,
            "the first allocated identity": 256,
            "the last of 24 bits": 0x00FF_FFFF,
            "a remote node's, scope 0x02": 0x0200_0001,
            "an unknown scope, 0x03": 0x0300_0001,
            "every bit set": 0xFFFF_FFFF,
        }.items()
    ),
    Row("identity 0 with a tunnel flag is a hit", HIT, {"peer": entry(0, TUNNEL)}),
    Row("identity 0 of a pod CIDR is a hit", HIT, {"node pods": entry(0)}),
    Row(
        "an internet host behind the default route is not ours",
        NOT_MESH,
        {"everything": entry(2), "node pods": entry(2, TUNNEL)},
        peer=INTERNET,
    ),
    Row(
        "the longest of three prefixes decides: hit",
        HIT,
        {"everything": entry(2), "node pods": entry(2, TUNNEL), "peer": entry(IDENTITY)},
    ),
    Row(
        "the longest of two prefixes decides: miss",
        MISS,
        {"everything": entry(IDENTITY), "node pods": entry(2, TUNNEL)},
    ),
    Row("a default route of the mesh makes everything miss", MISS, mesh=("everything",), peer=INTERNET),
]


def prefix(name: str, version: int) -> str:
    """Return the prefix that a row's word stands for."""
    return NAMES[name].prefix(version) if name in NAMES else CIDRS[name][version]


def set_up(bench: Bench, row: Row, version: int) -> None:
    """Fill the maps as a row says."""
    bench.entries({prefix(name, version): value for name, value in row.entries.items()})
    bench.mesh({prefix(name, version): 2 for name in row.mesh})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("row", [pytest.param(row, id=row.description) for row in ROWS])
def test_packet_goes_on_and_is_counted_once(
    bench: Bench, row: Row, direction: Direction, version: int
) -> None:
    """The table of DESIGN section 5: what the longest match and the mesh CIDRs say decides, and the packet passes."""
    set_up(bench, row, version)
    frame = Flow(row.peer, direction, version).udp()

    run = bench.run(direction, frame)

    assert run.verdict == TC_ACT_UNSPEC
    assert run.frame == frame
    assert bench.counts(direction) == row.expected
    assert bench.counts(Direction(1 - direction)) == {}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", BOTH)
def test_only_the_peer_is_looked_up(bench: Bench, direction: Direction, version: int) -> None:
    """Our own pod's address may be anything: a missing entry for it is not a miss."""
    bench.mesh({packets.PODS_OF_A[version]: 1, packets.PODS_OF_B[version]: 2})
    bench.entries({POD_B1.prefix(version): entry(IDENTITY)})

    bench.send(direction, Flow(POD_B1, direction, version, pod=POD_A1).udp())

    assert bench.counts(direction) == HIT


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        pytest.param(Row("", {"missed_drop": 1, **MISS}), TC_ACT_SHOT, id="a miss is dropped"),
        pytest.param(Row("", HIT, {"peer": entry(IDENTITY)}), TC_ACT_UNSPEC, id="a hit is not"),
        pytest.param(
            Row("", NOT_MESH, {"everything": entry(2)}, peer=INTERNET), TC_ACT_UNSPEC, id="internet is not"
        ),
    ],
)
def test_on_miss_drop_drops_misses_only(
    bench: Bench, row: Row, verdict: int, direction: Direction, version: int
) -> None:
    """Dropping is for users who prefer no answer to one as world; other packets must not suffer."""
    bench.configure(on_miss=OnMiss.DROP)
    set_up(bench, row, version)

    assert bench.send(direction, Flow(row.peer, direction, version).udp()) == verdict
    assert bench.counts(direction) == row.expected


ODD = {
    "a TCP SYN": lambda flow: flow.tcp(),
    "an echo request": lambda flow: flow.echo(),
    "a first fragment": lambda flow: flow.first_fragment(),
    "a later fragment": lambda flow: flow.later_fragment(),
    "IP options": lambda flow: flow.ip_options(),
    "no payload": lambda flow: flow.udp(b""),
    "a frame of 3,000 bytes": lambda flow: flow.udp(bytes(3_000)),
    "padding behind the packet": lambda flow: flow.udp(b"") + bytes(40),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("shape", ODD)
def test_every_shape_of_packet_hits_and_misses_alike(
    bench: Bench, shape: str, direction: Direction, version: int
) -> None:
    """A lookup needs nothing but the addresses, which fragments and odd headers have too."""
    bench.mesh({packets.PODS_OF_B[version]: 2})
    bench.entries({POD_B1.prefix(version): entry(IDENTITY)})
    for peer in (POD_B1, POD_B2):
        assert bench.send(direction, ODD[shape](Flow(peer, direction, version))) == TC_ACT_UNSPEC
    assert bench.counts(direction) == HIT | MISS


@pytest.mark.parametrize("direction", BOTH)
def test_longest_ipv4_header_is_read_like_any(bench: Bench, direction: Direction) -> None:
    """Sixty bytes of header push the ports away, not the addresses."""
    bench.mesh({packets.PODS_OF_B[4]: 2})

    assert bench.send(direction, Flow(direction=direction).longest_header()) == TC_ACT_UNSPEC
    assert bench.counts(direction) == MISS


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("length", range(1, 9))
def test_chains_of_extension_headers_miss_like_any(bench: Bench, length: int, direction: Direction) -> None:
    """However long the chain, the addresses are in front of it."""
    bench.mesh({packets.PODS_OF_B[6]: 2})
    frame = Flow(direction=direction, version=6).extensions(*packets.extension_chain(length))

    assert bench.send(direction, frame) == TC_ACT_UNSPEC
    assert bench.counts(direction) == MISS


@pytest.mark.parametrize("version", VERSIONS)
def test_big_tcp_is_no_malformed_packet(bench: Bench, version: int) -> None:
    """A GSO packet above 64 KiB carries length 0; without GSO that is nonsense in IPv4."""
    bench.mesh({packets.PODS_OF_B[version]: 2})
    frame = Flow(version=version).big_tcp()

    assert bench.send(Direction.EGRESS, frame, gso_size=1_400) == TC_ACT_UNSPEC
    assert bench.counts(Direction.EGRESS) == MISS
    bench.forget_counts()
    assert bench.send(Direction.EGRESS, frame) == TC_ACT_UNSPEC
    assert bench.counts(Direction.EGRESS) == (NOT_PARSED if version == 4 else MISS)


NONSENSE = {
    **{f"IPv4: {name}": frame for name, frame in packets.malformed(Flow(version=4)).items()},
    **{f"IPv6: {name}": frame for name, frame in packets.malformed(Flow(version=6)).items()},
    **packets.not_ip(),
    **{f"VLAN tags {ids}": Flow().vlan(*ids) for ids in ((5,), (0,), (5, 6), (0, 0))},
    "an 802.1ad tag": Flow().vlan(5, outer=0x88A8),
}
"""Tags stay where they are in a test run; test_frames.py has them as the kernel delivers them."""


@pytest.mark.parametrize(
    "settings", [{}, {"on_miss": OnMiss.DROP}, {"enforced": frozenset(Direction)}], ids=str
)
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("name", NONSENSE)
def test_what_cannot_be_read_passes_untouched(
    bench: Bench, name: str, direction: Direction, settings: dict[str, object]
) -> None:
    """Truncated, malformed, tagged in band or no IP at all: never a miss, never dropped, always counted."""
    bench.configure(**settings)
    bench.mesh({packets.WORLD[4]: 2, packets.WORLD[6]: 2})
    frame = NONSENSE[name]

    run = bench.run(direction, frame)

    assert run.verdict == TC_ACT_UNSPEC
    assert run.frame == frame
    assert bench.counts(direction) == NOT_PARSED


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", ["udp", "tcp", "echo", "first_fragment", "ip_options"])
def test_cut_anywhere_it_never_misses_wrongly(bench: Bench, shape: str, version: int) -> None:
    """A frame that ends before its IP length says is never a miss, wherever it ends."""
    bench.mesh({packets.WORLD[version]: 2})
    frame: bytes = getattr(Flow(version=version), shape)()
    shortest = 14 + (20 if version == 4 else 40)
    for length in range(shortest, len(frame)):
        assert bench.send(Direction.EGRESS, frame[:length]) == TC_ACT_UNSPEC
    assert bench.counts(Direction.EGRESS) == {"not_parsed": len(frame) - shortest}


def test_random_bytes_never_crash_and_never_drop(bench: Bench) -> None:
    """Whatever follows an IP Ethernet type, under every setting: a verdict, and every packet counted."""
    bench.configure(rearm_s=0)
    bench.mesh({packets.PODS_OF_B[4]: 2, packets.PODS_OF_B[6]: 2})
    for seed in range(400):
        header = Flow(version=4 if seed % 2 else 6).udp()[:14]
        noise = b"".join(
            (seed * 2_654_435_761 + i * 40_503 & 0xFFFFFFFF).to_bytes(4, "big") for i in range(30)
        )
        version = bytes([0x45 if seed % 2 else 0x60])
        assert bench.send(Direction.INGRESS, header + version + noise) == TC_ACT_UNSPEC
    counts = bench.counts(Direction.INGRESS)
    assert sum(counts.get(name, 0) for name in ("hit", "missed", "not_mesh", "not_parsed")) == 400


def test_peers_whose_tags_share_a_place_are_both_remembered(bench: Bench) -> None:
    """A tag says whose it is: one that another peer has left spares nothing."""
    first = packets.pod_of_b(0)
    second = next(
        pod
        for pod in map(packets.pod_of_b, range(1, 32_768))
        if place_of_tag(pod.address(4)) == place_of_tag(first.address(4))
    )
    bench.entries({host.prefix(4): entry(IDENTITY) for host in (first, second)})
    for host in (first, second):
        bench.send(Direction.EGRESS, Flow(host).udp())
    assert bench.datapath.recent.newest_first() == [second.address(4), first.address(4)]


def place_of_tag(address: bytes) -> int:
    """Return the place of an IPv4 address among the tags, as hash_of has it."""
    word = int.from_bytes(address, sys.byteorder)
    return (word << 32) * 0x9E3779B97F4A7C15 % (1 << 64) >> 51


def test_peers_that_are_hits_are_remembered_once_an_epoch(bench: Bench) -> None:
    """Newest first; misses and traffic outside the mesh are not noted."""
    bench.mesh({packets.PODS_OF_B[4]: 2})
    bench.entries({POD_B1.prefix(4): entry(IDENTITY), POD_B2.prefix(4): entry(IDENTITY)})
    for host in (POD_B1, POD_B2, packets.pod_of_b(9), INTERNET):
        for _ in range(3):
            bench.send(Direction.EGRESS, Flow(peer=host).udp())
    assert sorted(bench.datapath.recent.newest_first()) == sorted([POD_B1.address(4), POD_B2.address(4)])
    epoch = bench.datapath.config.read().epoch
    bench.datapath.config.change(epoch=epoch + 1)
    bench.datapath.config.void()  # else a hit of the same tick of the clock is not noted
    bench.send(Direction.EGRESS, Flow(peer=POD_B2).udp())
    assert bench.datapath.recent.newest_first() == [POD_B2.address(4), POD_B1.address(4)]
    bench.maps["lm_recent"].delete(abi.pack_dedup_key(POD_B2.address(4)))
    bench.send(Direction.EGRESS, Flow(peer=POD_B2).udp())
    assert bench.datapath.recent.newest_first() == [POD_B1.address(4)], "the tag says that it is there"
    bench.datapath.config.change(epoch=epoch + 2)
    bench.datapath.config.void()
    bench.send(Direction.EGRESS, Flow(peer=POD_B2).udp())
    assert bench.datapath.recent.newest_first() == [POD_B2.address(4), POD_B1.address(4)]
