"""Every packet that the tests send, and every address in them, by name.

Cluster a is ours: its pod one is the pod behind our program. Pods of cluster b are peers in the mesh, the internet
host is a peer that is not. A frame is what the program sees at the host's side of a pod's interface (egress) or of the
uplink (ingress), so ``Flow`` knows who is source and who destination.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_Router_Alert, IPOption_Timestamp
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import ARP, LLC, SNAP, Dot1Q, Dot3, Ether
from scapy.packet import Packet, Raw

from lazymesh.core.model import Address, Direction

if TYPE_CHECKING:
    from collections.abc import Callable

Version = int
"""4 or 6."""


@dataclass(frozen=True)
class Host:
    """One party, with an address in each family."""

    name: str
    v4: str
    v6: str

    def text(self, version: Version) -> str:
        """Return the address as people write it."""
        return self.v4 if version == 4 else self.v6

    def address(self, version: Version) -> Address:
        """Return the address as maps and signals hold it."""
        return ipaddress.ip_address(self.text(version)).packed

    def prefix(self, version: Version) -> str:
        """Return the prefix that covers this host alone."""
        return f"{self.v4}/32" if version == 4 else f"{self.v6}/128"


POD_A1 = Host("pod one of cluster a", "10.1.0.164", "fd00:1::a4")
POD_A2 = Host("pod two of cluster a", "10.1.0.165", "fd00:1::a5")
POD_B1 = Host("pod one of cluster b", "10.2.0.5", "fd00:2::5")
POD_B2 = Host("pod two of cluster b", "10.2.7.6", "fd00:2:0:7::6")
INTERNET = Host("a host in the internet", "203.0.113.80", "2001:db8::80")
NODE_B = Host("the node of cluster b", "172.18.0.2", "fc00:c111::2")

PODS_OF_A = {4: "10.1.0.0/16", 6: "fd00:1::/48"}
PODS_OF_B = {4: "10.2.0.0/16", 6: "fd00:2::/48"}
NODE_PODS_OF_B = {4: "10.2.0.0/24", 6: "fd00:2::/64"}
"""The pod CIDR of one node of cluster b, which covers its pod one."""
WORLD = {4: "0.0.0.0/0", 6: "::/0"}

_POD_MAC, _HOST_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"


def pod_of_b(number: int, version: Version = 4) -> Host:
    """Return one of 65,536 more pods of cluster b, all in its second half."""
    return Host(
        f"pod {number}", f"10.2.{128 + number // 256 % 128}.{number % 256}", f"fd00:2:0:80::{number:x}"
    )


@dataclass(frozen=True)
class Flow:
    """A pod of ours and its peer, seen in one direction; every builder returns the frame's bytes."""

    peer: Host = POD_B1
    direction: Direction = Direction.EGRESS
    version: Version = 4
    pod: Host = POD_A1
    pod_port: int = 40_000
    peer_port: int = 80

    def back(self) -> Flow:
        """Return the same flow in the other direction."""
        other = Direction.INGRESS if self.direction is Direction.EGRESS else Direction.EGRESS
        return replace(self, direction=other)

    def udp(self, data: bytes = b"ping") -> bytes:
        """Return a UDP datagram."""
        return bytes(self.frame(self._ports(UDP) / Raw(data)))

    def tcp(self, flags: str = "S", data: bytes = b"") -> bytes:
        """Return a TCP segment with these flags."""
        return bytes(self.frame(self._ports(TCP, flags=flags, seq=1) / Raw(data)))

    def echo(self, identifier: int = 7) -> bytes:
        """Return an ICMP echo request of either family."""
        return bytes(self.frame(self._echo(identifier, request=True)))

    def echo_reply(self, identifier: int = 7) -> bytes:
        """Return the answer to an echo request of either family."""
        return bytes(self.frame(self._echo(identifier, request=False)))

    def first_fragment(self) -> bytes:
        """Return the first fragment of a UDP datagram: it has the ports."""
        return self._fragment(0, more=True, payload=self._ports(UDP, len=1_208) / Raw(bytes(592)))

    def later_fragment(self) -> bytes:
        """Return a later fragment: addresses, but no ports."""
        return self._fragment(75, more=False, payload=Raw(bytes(600)))

    def ip_options(self) -> bytes:
        """Return an IPv4 datagram with IP options, or an IPv6 one with as many extension headers."""
        if self.version == 4:
            options = [IPOption_Router_Alert(), IPOption_NOP(), IPOption_Timestamp()]
            return bytes(self.frame(self._ports(UDP) / Raw(b"optional"), options=options))
        return self.extensions(IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt())

    def longest_header(self) -> bytes:
        """Return an IPv4 TCP segment behind the longest header there is, 60 bytes."""
        return bytes(self.frame(self._ports(TCP, flags="S"), options=[IPOption_NOP()] * 40))

    def extensions(self, *headers: Packet, flags: str | None = None) -> bytes:
        """Return an IPv6 datagram, or a TCP segment with these flags, behind extension headers."""
        payload = self._ports(TCP, flags=flags) if flags else self._ports(UDP) / Raw(b"extended")
        for header in reversed(headers):
            payload = header / payload
        return bytes(self.frame(payload))

    def vlan(self, *ids: int, outer: int = 0x8100) -> bytes:
        """Return a UDP datagram behind VLAN tags, outermost first."""
        plain = Ether(self.udp())
        tagged: Packet = plain.payload
        for number in reversed(ids):
            tagged = Dot1Q(vlan=number) / tagged
        return bytes(Ether(src=plain.src, dst=plain.dst, type=outer) / tagged)

    def big_tcp(self) -> bytes:
        """Return a TCP segment that says it is longer than its length field can say: 0."""
        length = {"len": 0} if self.version == 4 else {"plen": 0}
        return bytes(self.frame(self._ports(TCP, flags="A") / Raw(bytes(3_000)), **length))

    def frame(self, payload: Packet, **ip_fields: object) -> Packet:
        """Return Ethernet and IP headers of this flow around a payload."""
        source, target = self._ends()
        if self.version == 4:
            network = IP(src=source.v4, dst=target.v4, **ip_fields)
        else:
            network = IPv6(src=source.v6, dst=target.v6, **ip_fields)
        macs = (_POD_MAC, _HOST_MAC) if self.direction is Direction.EGRESS else (_HOST_MAC, _POD_MAC)
        return Ether(src=macs[0], dst=macs[1]) / network / payload

    def _ends(self) -> tuple[Host, Host]:
        return (self.pod, self.peer) if self.direction is Direction.EGRESS else (self.peer, self.pod)

    def _ports(self, layer: Callable[..., Packet], **fields: object) -> Packet:
        ports = (self.pod_port, self.peer_port)
        source, target = ports if self.direction is Direction.EGRESS else ports[::-1]
        return layer(sport=source, dport=target, **fields)

    def _echo(self, identifier: int, *, request: bool) -> Packet:
        if self.version == 4:
            return ICMP(type="echo-request" if request else "echo-reply", id=identifier) / Raw(b"echo")
        return (ICMPv6EchoRequest if request else ICMPv6EchoReply)(id=identifier, data=b"echo")

    def _fragment(self, offset: int, *, more: bool, payload: Packet) -> bytes:
        if self.version == 4:
            return bytes(self.frame(payload, id=99, frag=offset, flags="MF" if more else 0, proto=17))
        return bytes(self.frame(IPv6ExtHdrFragment(nh=17, offset=offset, m=int(more), id=99) / payload))


def malformed(flow: Flow) -> dict[str, bytes]:
    """Return frames that no sane sender makes, each with what is wrong with it."""
    whole = flow.udp(bytes(64))
    network = 14
    frames = {
        "a frame shorter than its IP length": whole[:-1],
        "a frame much shorter than its IP length": whole[: network + 44],
        "an IP version that contradicts the Ethernet type": _with(
            whole, network, 0x50 | whole[network] & 0x0F
        ),
        "the other IP version": _with(whole, network, (0x60 if flow.version == 4 else 0x40) | 5),
        "nothing but zeros": whole[:network] + bytes(80),
    }
    if flow.version == 4:
        frames |= {
            "a header length of 16": _with(whole, network, 0x44),
            "a header longer than the packet": whole[:network]
            + _with(whole[network:], 0, 0x4F, (3, 40))[:50],
            "a total length of 10": _with(whole, network + 2, 0, (network + 3, 10)),
            "a total length of 0": _with(whole, network + 2, 0, (network + 3, 0)),
        }
    return frames


def headless(flow: Flow) -> dict[str, bytes]:
    """Return frames that end within their headers; a device takes them, but newer kernels' test runs do not."""
    whole = flow.udp(bytes(64))
    header = 20 if flow.version == 4 else 40
    return {
        f"{length} bytes after the Ethernet header": whole[: 14 + length] for length in (0, 1, 4, header - 1)
    }


def not_ip() -> dict[str, bytes]:
    """Return frames of other protocols."""
    macs = {"src": _POD_MAC, "dst": "ff:ff:ff:ff:ff:ff"}
    body = Raw(bytes(60))
    return {
        "an ARP request": bytes(Ether(**macs) / ARP(psrc=POD_A1.v4, pdst=POD_B1.v4)),
        "an 802.3 frame with SNAP": bytes(Dot3(**macs) / LLC(dsap=0xAA, ssap=0xAA, ctrl=3) / SNAP() / body),
        "an LLDP frame": bytes(Ether(type=0x88CC, **macs) / body),
        "an MPLS frame": bytes(Ether(type=0x8847, **macs) / body),
        "a frame of an unknown type": bytes(Ether(type=0xFFFF, **macs) / body),
    }


def extension_chain(length: int) -> list[Packet]:
    """Return that many IPv6 extension headers, of all the kinds that may be walked over and of several lengths."""
    padded = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(18))])
    kinds = [padded, IPv6ExtHdrRouting(addresses=[POD_A2.v6, POD_B2.v6]), IPv6ExtHdrDestOpt()]
    return [IPv6ExtHdrHopByHop(), *(kinds[i % 3] for i in range(length - 1))]


def _with(frame: bytes, offset: int, value: int, *more: tuple[int, int]) -> bytes:
    changed = bytearray(frame)
    for where, what in ((offset, value), *more):
        changed[where] = what
    return bytes(changed)


def of_protocol(flow: Flow, number: int) -> bytes:
    """Return a packet of a transport protocol by number, with zeros for content."""
    field = {"proto": number} if flow.version == 4 else {"nh": number}
    return bytes(flow.frame(Raw(bytes(40)), **field))


def unreachable(flow: Flow) -> bytes:
    """Return an ICMP error, which quotes a packet of the flow in the other direction."""
    quoted = Raw(flow.back().udp()[14:])
    error = ICMP(type=3, code=3) if flow.version == 4 else ICMPv6DestUnreach(code=4)
    return bytes(flow.frame(error / quoted))


def with_payload_cut(flow: Flow, kind: str, length: int) -> bytes:
    """Return a TCP, UDP or ICMP packet whose IP length is right, with only so many bytes behind the IP header."""
    whole: bytes = getattr(flow, kind)()
    header = 20 if flow.version == 4 else 40
    cut = whole[: 14 + header + length]
    if flow.version == 4:
        return _with(cut, 16, 0, (17, header + length))
    return _with(cut, 18, 0, (19, length))
