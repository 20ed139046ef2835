"""Hostile frames by number, and what has to become of each: an independent reading of DESIGN section 5.

A frame is made from a seed and a number alone, so a number is all that it takes to see one again. It begins as a packet
that somebody could send, or as noise, gets a peer for whom the maps have something to say, and is then bent: cut,
stretched, overwritten where headers are, tagged, wrapped. What is expected is worked out from the bytes here in Python,
by the words of the design and of the RFCs, with a longest-prefix match of its own; nothing of the program is used.
"""

from __future__ import annotations

import ipaddress
import random
import struct
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.layers.l2 import GRE, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Raw

from lazymesh.core.model import Direction, Entry, EntryFlag
from tests.support import packets
from tests.support.packets import NODE_B, Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lazymesh.core.model import Address, Network

_Value = TypeVar("_Value")

_IPV4, _IPV6, _TAGS = 0x0800, 0x86DD, (0x8100, 0x88A8)
_JUMBO = 9_014
_LONGEST = 16_000

_POD, _TUNNEL, _CIDR = 131_073, EntryFlag.HAS_TUNNEL_EP, 0x0100_0001

ENTRIES: dict[str, Entry] = {
    "0.0.0.0/0": Entry(2),
    "10.2.0.0/24": Entry(2, NODE_B.address(4), 0, _TUNNEL),
    "10.2.0.5/32": Entry(_POD, NODE_B.address(4), 0, _TUNNEL),
    "10.2.7.0/24": Entry(_CIDR),
    "10.3.0.0/16": Entry(_POD + 1),
    "10.3.9.0/24": Entry(9),
    "198.51.100.0/24": Entry(10, NODE_B.address(4), 0, _TUNNEL),
    "203.0.113.0/24": Entry(_CIDR + 1, NODE_B.address(4), 0, _TUNNEL),
    "203.0.113.7/32": Entry(0),
    "fd00:2::/64": Entry(2, NODE_B.address(4), 0, _TUNNEL),
    "fd00:2::5/128": Entry(_POD),
    "fd00:2:0:7::/64": Entry(_CIDR),
    "fd00:3::/48": Entry(0x0200_0001),
    "fd00:3:0:9::/64": Entry(10),
    "2001:db8:1::/48": Entry(2, NODE_B.address(6), 0, _TUNNEL | EntryFlag.IPV6_TUNNEL_EP),
    "2001:db8:2::/48": Entry(_CIDR),
}
"""What the ipcache has: an answer of every kind, some of them inside others. IPv6 has no default route."""

MESH: dict[str, int] = {
    "10.2.0.0/16": 2,
    "10.2.128.0/17": 0,
    "10.3.0.0/16": 3,
    "10.9.9.9/32": 9,
    "fd00:2::/48": 2,
    "fd00:2:0:8000::/49": 0,
    "fd00:3::/48": 3,
}
"""Pod CIDRs of the mesh with their cluster ids; 0: two clusters claim it."""

_PEERS = {
    4: "10.2.0.5 10.2.0.6 10.2.7.7 10.2.9.1 10.2.200.1 10.3.1.1 10.3.9.1 10.9.9.9"
    " 198.51.100.3 203.0.113.7 203.0.113.8 8.8.8.8",
    6: "fd00:2::5 fd00:2::6 fd00:2:0:7::7 fd00:2:0:70::1 fd00:2:0:8000::1 fd00:3::1 fd00:3:0:9::1 2001:db8:1::1"
    " 2001:db8:2::1 2001:4860::8888 ::ffff:10.2.0.6",
}
_PEER_BYTES = {
    version: [ipaddress.ip_address(text).packed for text in texts.split()]
    for version, texts in _PEERS.items()
}


class Frame(NamedTuple):
    """One frame, and how it is handed to the program."""

    data: bytes
    direction: Direction
    gso_size: int


class Expected(NamedTuple):
    """What becomes of it: the counter that moves, and for a miss what is signalled."""

    cause: str
    """``hit``, ``not_mesh``, ``not_parsed`` or ``missed``."""
    peer: Address | None = None
    """Whom it is from or for; None if that cannot be made out."""
    signal: tuple[int, Direction, Address] | None = None
    """Cluster id, direction, address."""


# --- what has to become of a frame --------------------------------------------------------------------------------


def expected(frame: Frame) -> Expected:
    """Return it for a frame whose bytes are all there is: tags in band are no business of ours."""
    return _of_packet(frame.data[14:], int.from_bytes(frame.data[12:14]), frame.direction, frame.gso_size > 0)


def expected_of_device(frame: Frame) -> Expected | None:
    """Return it for a frame that a device receives: the kernel takes the outer tag off. None: it never gets to us."""
    kind, body = int.from_bytes(frame.data[12:14]), frame.data[14:]
    if kind not in _TAGS:
        return _of_packet(body, kind, frame.direction, gso=False)
    if len(body) < 6:  # no room for a tag and a type: the kernel drops it
        return None
    tag, kind = struct.unpack_from(">HH", body)
    # Another VLAN has addresses of its own; id 0 is a priority and no VLAN.
    if tag & 0x0FFF or kind in _TAGS:
        return Expected("not_parsed")
    return _of_packet(body[4:], kind, frame.direction, gso=False)


def _of_packet(body: bytes, kind: int, direction: Direction, gso: bool) -> Expected:
    ends = _ipv4_ends(body, gso) if kind == _IPV4 else _ipv6_ends(body) if kind == _IPV6 else None
    if ends is None:
        return Expected("not_parsed")
    peer = ends[direction is Direction.EGRESS]
    cause, cluster = judge(peer)
    return Expected(cause, peer, (cluster, direction, peer) if cause == "missed" else None)


def _ipv4_ends(packet: bytes, gso: bool) -> tuple[Address, Address] | None:
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    header, total = 4 * (packet[0] & 0xF), int.from_bytes(packet[2:4])
    if total == 0 and gso:  # longer than the field can say, to be cut up later
        total = len(packet)
    if header < 20 or not header <= total <= len(packet):
        return None
    return packet[12:16], packet[16:20]


def _ipv6_ends(packet: bytes) -> tuple[Address, Address] | None:
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return None
    if 40 + int.from_bytes(packet[4:6]) > len(packet):
        return None
    return packet[8:24], packet[24:40]


@lru_cache(maxsize=65_536)
def judge(peer: Address) -> tuple[str, int]:
    """Return what the table of DESIGN section 5 says of a peer, and the cluster id of its mesh CIDR (0: none)."""
    entry, cluster = _longest(peer, _entries()), _longest(peer, _mesh())
    in_mesh = cluster is not None
    if entry is not None and entry.identity in (2, 9, 10) and entry.flags & _TUNNEL:
        return "missed", cluster or 0
    if entry is None or entry.identity in (2, 9, 10) or entry.identity >> 24 == 1:
        return ("missed", cluster or 0) if in_mesh else ("not_mesh", 0)
    return "hit", 0


def in_mesh(peer: Address) -> bool:
    """Tell whether a peer lies in a mesh CIDR: only then a policy has a say."""
    return _longest(peer, _mesh()) is not None


@cache
def _entries() -> dict[Network, Entry]:
    return {ipaddress.ip_network(text): entry for text, entry in ENTRIES.items()}


@cache
def _mesh() -> dict[Network, int]:
    return {ipaddress.ip_network(text): cluster for text, cluster in MESH.items()}


def _longest(peer: Address, prefixes: Mapping[Network, _Value]) -> _Value | None:
    address = ipaddress.ip_address(peer)
    found = [network for network in prefixes if network.version == address.version and address in network]
    return prefixes[max(found, key=lambda network: network.prefixlen)] if found else None


# --- frames -------------------------------------------------------------------------------------------------------


def frame(seed: int, number: int) -> Frame:
    """Return the frame of this number."""
    dice = random.Random(seed << 40 | number)
    direction = Direction(dice.getrandbits(1))
    if dice.random() < 0.03:
        data = bytearray(dice.randbytes(dice.randrange(14, 120)))
        if dice.random() < 0.7:
            data[12:14] = dice.choice((b"\x08\x00", b"\x86\xdd"))
    else:
        version = dice.choice((4, 6))
        data = bytearray(dice.choice(_templates()[version, direction]))
        _set_peer(dice, data, version, direction)
        if dice.random() < 0.6:
            for _ in range(dice.choice((1, 1, 2, 3))):
                data = dice.choice(_BENDS)(dice, data)
    gso_size = 1_400 if dice.random() < 0.03 else 0
    return Frame(bytes(data[:_LONGEST]).ljust(14, b"\0"), direction, gso_size)


@cache
def _templates() -> dict[tuple[int, Direction], list[bytes]]:
    """Return whole packets of every shape, by IP version and direction."""
    found: dict[tuple[int, Direction], list[bytes]] = {}
    for direction in Direction:
        for version in (4, 6):
            flow = Flow(direction=direction, version=version)
            shapes = [
                *(flow.udp(bytes(size)) for size in (0, 1, 64, 1_400)),
                *(flow.tcp(flags) for flags in ("S", "A", "FA")),
                flow.echo(),
                flow.echo_reply(),
                flow.first_fragment(),
                flow.later_fragment(),
                flow.ip_options(),
                flow.big_tcp(),
                flow.vlan(5),
                flow.vlan(0),
                flow.vlan(5, 6, outer=0x88A8),
                flow.vlan(0, 0),
                packets.unreachable(flow),
                *(packets.of_protocol(flow, number) for number in (0, 4, 41, 47, 50, 51, 58, 132, 255)),
                bytes(flow.frame(GRE() / Ether(flow.back().udp()).payload)),
                bytes(flow.frame(GRE(proto=0x6558) / Ether(flow.udp()))),
                bytes(flow.frame(UDP(dport=4_789) / VXLAN(vni=2) / Ether(flow.udp()))),
                bytes(flow.frame(UDP(dport=6_081) / Raw(bytes(8) + flow.udp()))),
                bytes(flow.frame(Ether(flow.udp()).payload)),
                flow.udp(bytes(_JUMBO - len(flow.udp(b"")))),
            ]
            if version == 4:
                shapes.append(flow.longest_header())
            else:
                shapes += [flow.extensions(*packets.extension_chain(length)) for length in (1, 3, 6, 7)]
                shapes.append(flow.extensions(*packets.extension_chain(2), IPv6ExtHdrFragment(offset=9)))
            found[version, direction] = [*shapes, *packets.not_ip().values()]
    return found


def _set_peer(dice: random.Random, data: bytearray, version: int, direction: Direction) -> None:
    peer = dice.choice(_PEER_BYTES[version])
    if dice.random() < 0.1:
        peer = dice.randbytes(len(peer))
    at = 14 + ((12, 16) if version == 4 else (8, 24))[direction is Direction.EGRESS]
    data[at : at + len(peer)] = peer


def _cut(dice: random.Random, data: bytearray) -> bytearray:
    near = min(len(data), 80)
    return data[: dice.choice((dice.randrange(14, near + 1), dice.randrange(14, len(data) + 1)))]


def _stretch(dice: random.Random, data: bytearray) -> bytearray:
    return data + bytes(dice.choice((1, 2, 7, 46, 500, 4_096, _JUMBO)))


def _flip(dice: random.Random, data: bytearray) -> bytearray:
    data[dice.randrange(12, max(13, min(len(data), 80)))] ^= 1 << dice.randrange(8)
    return data


def _overwrite(dice: random.Random, data: bytearray) -> bytearray:
    at = dice.randrange(12, max(13, min(len(data), 60)))
    data[at : at + 2] = dice.choice((b"\0\0", b"\xff\xff", b"\0\1", dice.randbytes(2)))
    return data


def _wrong_length(dice: random.Random, data: bytearray) -> bytearray:
    """Have the IP header say a length around that of the frame, of its own header, or of nothing."""
    at = 16 if data[14:15] < b"\x50" else 18
    body = len(data) - 14
    value = dice.choice((0, 1, 19, 20, 21, body - 41, body - 40, body - 39, body - 1, body, body + 1, 0xFFFF))
    data[at : at + 2] = struct.pack(">H", max(value, 0) & 0xFFFF)
    return data


def _first_byte(dice: random.Random, data: bytearray) -> bytearray:
    """Have another IP version, or another length of the header."""
    data[14:15] = bytes((dice.choice((4, 4, 4, 6, 0, 5, 15)) << 4 | dice.randrange(16),))
    return data


def _kind(dice: random.Random, data: bytearray) -> bytearray:
    kinds = (_IPV4, _IPV6, *_TAGS, 0x0806, 0x8847, 0x9100, 0x0000, 0x05DC, 0xFFFF)
    data[12:14] = struct.pack(">H", dice.choice(kinds))
    return data


def _tag(dice: random.Random, data: bytearray) -> bytearray:
    tag = struct.pack(
        ">HH", dice.choice(_TAGS), dice.choice((0, 1, 5, 0x0100, 0x2000, 0x2005, 0x0FFF, 0xFFFF))
    )
    return data[:12] + tag + data[12:]


def _wrap(dice: random.Random, data: bytearray) -> bytearray:
    """Put the frame into another packet."""
    version = dice.choice((4, 6))
    outer = bytearray(dice.choice(_templates()[version, Direction(dice.getrandbits(1))]))
    return outer[: dice.randrange(34, min(len(outer), 90))] + data


def _splice(dice: random.Random, data: bytearray) -> bytearray:
    """Go on as another packet."""
    other = dice.choice(_templates()[dice.choice((4, 6)), Direction.EGRESS])
    at = dice.randrange(12, min(len(data), len(other), 80))
    return data[:at] + other[at:]


_BENDS: tuple[Callable[[random.Random, bytearray], bytearray], ...] = (
    *(_cut, _cut, _stretch, _flip, _flip, _flip, _overwrite, _overwrite),
    *(_wrong_length, _wrong_length, _first_byte, _kind, _tag, _wrap, _splice),
)
