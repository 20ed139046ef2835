"""Another TC program behind ours: writes down what it sees, and whether the address it was told has its entry by then.

Attached like any neighbour's: at the tail of the tcx chain, or as a clsact filter of a later priority.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lazymesh.datapath import libbpf
from lazymesh.datapath.libbpf import Map, MapLayout
from tests.support.assembly import count, leave, load, lookup, op
from tests.support.prog_run import TC_ACT_UNSPEC
from tests.support.tcx import TcxLink

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.namespaces import Namespace

_MARK, _HASH = 8, 68
"""Offsets in struct __sk_buff."""


@dataclass(frozen=True)
class Seen:
    """What the follower saw: the last packet's words, and how many there were."""

    mark: int
    hash: int
    length: int
    source_mac: bytes
    with_entry: int
    without_entry: int


class Follower:
    """The program on one interface's ingress, attached while entered, behind everybody who is there."""

    def __init__(
        self,
        namespace: Namespace,
        interface: str,
        pins: Path,
        key: bytes,
        style: str = "clsact",
        *,
        only: bool = False,
    ) -> None:
        """``key`` is looked up in the pinned ipcache with each packet, or with each one to its address only."""
        self._namespace, self._interface, self._style = namespace, interface, style
        self._link: TcxLink | None = None
        self._pin = pins.parent / "follower"
        self._notes = Map.create("follower", MapLayout(libbpf.MAP_TYPE_ARRAY, 4, 40, 1, 0))
        self._ipcache = Map.pinned(pins / "lm_ipcache")
        self._key, self._only = key, only

    def __enter__(self) -> Self:
        program = load(_code(self._notes.fd, self._ipcache.fd, self._key, only=self._only))
        if self._style == "tcx":
            self._link = self._namespace.call(TcxLink.attach, program, self._interface)
            os.close(program)
            return self
        libbpf.pin(program, self._pin)
        os.close(program)
        self._namespace.run("tc", "qdisc", "add", "dev", self._interface, "clsact", check=False)
        self._tc("add", "bpf", "direct-action", "pinned", str(self._pin))
        return self

    def __exit__(self, *exc: object) -> None:
        if self._link:
            self._link.close()
        else:
            self._tc("del")
            self._pin.unlink()
        self._notes.close()
        self._ipcache.close()

    def seen(self) -> Seen:
        """Return what it has written down."""
        raw = self._notes.lookup(bytes(4)) or b""
        mark, skb_hash, length, mac, without, with_entry = struct.unpack("=III4x6s2xQQ", raw)
        return Seen(mark, skb_hash, length, mac, with_entry, without)

    def _tc(self, verb: str, *what: str) -> None:
        where = ("dev", self._interface, "ingress", "prio", "50000", "protocol", "all")
        self._namespace.run("tc", "filter", verb, *where, *what)


def _code(notes: int, ipcache: int, key: bytes, *, only: bool) -> bytes:
    code = op(0x62, 10, offset=-4)  # the notes' index on the stack
    code += lookup(notes, -4) + op(0x15, 0, offset=count(_rest(ipcache, key))) + _rest(ipcache, key)
    if only:
        code = _unless_to(key, count(code)) + code
    return op(0xBF, 6, 1) + code + leave(TC_ACT_UNSPEC)  # r6 = skb


def _unless_to(key: bytes, skip: int) -> bytes:
    """Return what skips so much for every packet that is not to the key's address: pods have some of their own."""
    ipv4 = key[7] == 1
    (word,) = struct.unpack_from("=i", key, 8 if ipv4 else 20)  # of IPv6 the last of four will do
    code = (
        op(0xBF, 1, 6)
        + op(0xB7, 2, immediate=30 if ipv4 else 50)
        + op(0xBF, 3, 10)
        + op(0x07, 3, immediate=-4)
    )
    code += op(0xB7, 4, immediate=4) + op(0x85, immediate=26)  # bpf_skb_load_bytes
    return (
        code + op(0x55, 0, offset=skip + 2) + op(0x61, 1, 10, -4) + op(0x56, 1, offset=skip, immediate=word)
    )


def _rest(ipcache: int, key: bytes) -> bytes:
    code = op(0xBF, 7, 0)
    for source, target in ((_MARK, 0), (_HASH, 4), (0, 8)):
        code += op(0x61, 1, 6, source) + op(0x63, 7, 1, target)
    code += op(0xBF, 1, 6) + op(0xB7, 2, immediate=6) + op(0xBF, 3, 7) + op(0x07, 3, immediate=16)
    code += op(0xB7, 4, immediate=6) + op(0x85, immediate=26)  # bpf_skb_load_bytes: the source MAC
    for at in range(0, len(key), 4):
        (word,) = struct.unpack_from("=i", key, at)
        code += op(0x62, 10, offset=at - 8 - len(key), immediate=word)
    code += lookup(ipcache, -8 - len(key))
    code += op(0x15, 0, offset=1) + op(0x07, 7, immediate=8)  # found: the second counter
    return code + op(0x79, 1, 7, 24) + op(0x07, 1, immediate=1) + op(0x7B, 7, 1, 24)
