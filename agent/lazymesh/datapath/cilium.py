"""A Cilium agent on the node: where it pins its ipcache, and which ipcache its programs really look into.

On a node that went from 1.17 to 1.18, or back, both pins can be there, and only the running version's is kept up to
date (cilium-formats 1.1). The programs tell: not the one on a pod's interface, but those behind its array of tail calls
(cilium-live 6). Only read here; nothing of Cilium's is ever loaded, pinned or detached by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Self

from pyroute2 import AsyncIPRoute, NetlinkError

from lazymesh.core.model import parse_address
from lazymesh.datapath import libbpf
from lazymesh.datapath.hooks import attachments, clsact_attachments, link_kind, tcx_attachments
from lazymesh.datapath.libbpf import MAP_TYPE_PROG_ARRAY, Map
from lazymesh.datapath.maps import IpcacheMap, view_of
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from lazymesh.core.model import Address
    from lazymesh.datapath.hooks import Attachment
    from lazymesh.datapath.interfaces import InterfaceSelection

PINS = ("cilium_ipcache_v2", "cilium_ipcache")
"""Since 1.18, and before."""
TAG = 0x6D6C
"""``lm`` in memory: what our entries in Cilium's map carry in their padding (maps.IpcacheMap)."""
_PREFIX = "cil_"
"""What Cilium itself knows its programs by."""
_CALLS_MOST = 1_024
"""An endpoint's array of tail calls has some dozens of slots; the one of all endpoints' policies has 65,535."""


def pins_directory(bpffs: Path) -> Path:
    """Return where Cilium pins its maps."""
    return bpffs / "tc" / "globals"


def pinned_ipcaches(bpffs: Path) -> dict[Path, int]:
    """Return the ids of the maps behind Cilium's pins; DatapathError when one cannot be opened."""
    found = {}
    for name in PINS:
        path = pins_directory(bpffs) / name
        try:
            with contextlib.suppress(FileNotFoundError), contextlib.closing(Map.pinned(path)) as opened:
                found[path] = opened.map_id
        except OSError as exc:
            raise DatapathError(f"cannot open Cilium's ipcache at {path}: {exc.strerror}") from exc
    return found


class NodeView:
    """The node around the selected interfaces: which ipcaches their programs look into, and the node's addresses.

    To be entered (``async with``); asks the kernel about each program once. DatapathError when the kernel does not
    answer.
    """

    def __init__(self, selection: InterfaceSelection) -> None:
        self._selection = selection
        self.tcx_in_use = False
        """Cilium is attached by tcx: what runs by clsact comes too late, or is deleted."""
        self._known: dict[int, frozenset[int]] = {}
        self._route = AsyncIPRoute()
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._route.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._route.__aexit__(*exc)

    async def chains(self) -> dict[str, list[Attachment]]:
        """Return the programs at the ingress of every selected interface, in the order in which they run."""
        async with self._asking_the_kernel():
            return {name: await attachments(self._route, index) for index, name in self._selected()}

    async def ipcaches(self) -> frozenset[int]:
        """Return the ids of the maps that Cilium's programs at the ingress of these interfaces look into."""
        theirs: dict[int, Attachment] = {}
        async with self._asking_the_kernel():
            for index, _ in self._selected():
                # Filters are asked for one interface at a time, which is dear, and tcx is where it is if it is there.
                found = _ciliums(tcx_attachments(index)) or _ciliums(
                    await clsact_attachments(self._route, index)
                )
                theirs |= found
        self.tcx_in_use = any(each.style == "tcx" for each in theirs.values())
        # A program that is loaded never changes; one that leads nowhere is perhaps just being set up.
        self._known = {number: self._known.get(number) or _ipcaches_behind(number) for number in theirs}
        return frozenset().union(*self._known.values())

    async def netkit(self) -> list[str]:
        """Return the names of netkit devices, on which lazymesh cannot be yet."""
        async with self._asking_the_kernel():
            links = [link async for link in await self._route.link("dump", kind="netkit")]
        return sorted(link.get("ifname") for link in links if link_kind(link) == "netkit")

    async def addresses(self) -> set[Address]:
        """Return all addresses of this node."""
        async with self._asking_the_kernel():
            items = [item async for item in await self._route.addr("dump")]
        found = [item.get_attr("IFA_LOCAL") or item.get_attr("IFA_ADDRESS") for item in items]
        return {parse_address(text) for text in found if text}

    @contextlib.asynccontextmanager
    async def _asking_the_kernel(self) -> AsyncIterator[None]:
        """Take turns, and translate what goes wrong, such as a socket without room for an answer: the next look may do.

        A netlink socket gives one list at a time; asked for another meanwhile, the kernel says that it is busy.
        """
        async with self._turn:
            try:
                yield
            except (NetlinkError, OSError) as exc:
                raise DatapathError(f"cannot ask the kernel about interfaces and programs: {exc}") from exc

    def _selected(self) -> list[tuple[int, str]]:
        return [each for each in socket.if_nameindex() if self._selection.direction_of(each[1]) is not None]


def _ciliums(chain: list[Attachment]) -> dict[int, Attachment]:
    return {each.program_id: each for each in chain if each.name.startswith(_PREFIX)}


def _ipcaches_behind(program_id: int) -> frozenset[int]:
    """Return the ipcaches that a program, or one of its tail calls, refers to."""
    try:
        program = libbpf.describe_program(program_id)
    except OSError:  # it was replaced a moment ago
        return frozenset()
    found: set[int] = set()
    calls: set[int] = set()
    for map_id in program.map_ids:
        _note_map(map_id, found, calls)
    for call in calls:
        with contextlib.suppress(OSError):
            for map_id in libbpf.describe_program(call).map_ids:
                _note_map(map_id, found, set())
    return frozenset(found)


def _note_map(map_id: int, ipcaches: set[int], calls: set[int]) -> None:
    """Add a map to the ipcaches if it is one, or what is in it to the calls if it is an array of them."""
    with contextlib.suppress(OSError), contextlib.closing(Map.by_id(map_id)) as opened:
        if view_of(opened.layout) is not None:
            ipcaches.add(map_id)
        elif opened.layout.kind == MAP_TYPE_PROG_ARRAY and opened.layout.max_entries <= _CALLS_MOST:
            calls.update(opened.program_ids())


def is_pinned_here(bpffs: Path) -> bool:
    """Tell whether a Cilium agent has pinned its ipcache here; False also for whoever may not look."""
    return any(os.access(pins_directory(bpffs) / name, os.F_OK) for name in PINS)


def take_out_ours(bpffs: Path, read: Iterable[int] = ()) -> int:
    """Delete every entry of ours from Cilium's ipcaches; return how many there were.

    read: maps that its programs look into, which need not be pinned. One of a layout that we do not know has none.
    """
    taken = 0
    for map_id in {*pinned_ipcaches(bpffs).values(), *read}:
        with contextlib.suppress(FileNotFoundError), contextlib.closing(Map.by_id(map_id)) as opened:
            if view_of(opened.layout) is None:
                continue
            ipcache = IpcacheMap(opened, pins_directory(bpffs), TAG)
            for address in list(ipcache.tagged()):
                standing = ipcache.stands(address)
                if standing is not None and standing.tagged:
                    taken += ipcache.delete(address)
    return taken
