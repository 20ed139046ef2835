"""A Cilium agent on the node: where it pins its ipcache, and which ipcache its programs really look into.

On a node that went from 1.17 to 1.18, or back, both pins can exist, and only the running version's is kept up to date
(cilium-formats 1.1). Which one is in use shows in the programs: not the one on a pod's interface, but those in its
array of tail calls (cilium-live 6). This only reads; we never load, pin or detach anything of Cilium's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pyroute2 import AsyncIPRoute, NetlinkError

from lazymesh.core.model import parse_address
from lazymesh.datapath import programs
from lazymesh.datapath.hooks import attachments, clsact_attachments, link_kind, link_name, tcx_attachments
from lazymesh.datapath.ipcachemaps import IpcacheMap, ipcache_layout_of
from lazymesh.datapath.libbpf import MAP_TYPE_PROG_ARRAY, Map
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from lazymesh.core.model import Address
    from lazymesh.datapath.hooks import Attachment
    from lazymesh.datapath.interfaces import InterfaceSelection

PINS = ("cilium_ipcache_v2", "cilium_ipcache")
"""Since 1.18, and earlier."""
TAG = 0x6D6C
"""``lm`` in memory: the tag in the padding of our entries in Cilium's map (ipcachemaps.IpcacheMap)."""
_PREFIX = "cil_"
"""The prefix by which Cilium itself recognizes its programs."""
_INTERFACES = Path("/proc/thread-self/net/dev")
"""Those of the thread's network namespace, listed without waiting for the kernel's lock over them."""
_CALLS_MOST = 1_024
"""An endpoint's array of tail calls has a few dozen slots; that of all endpoints' policies has 65,535."""


def pins_directory(bpffs: Path) -> Path:
    """Return where Cilium pins its maps."""
    return bpffs / "tc" / "globals"


def pinned_ipcaches(bpffs: Path) -> dict[Path, int]:
    """Return the ids of Cilium's pinned ipcaches; DatapathError when one cannot be opened."""
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

    Use it with ``async with``. Queries each program once; DatapathError when the kernel does not answer.
    """

    def __init__(self, selection: InterfaceSelection) -> None:
        self._selection = selection
        self.tcx_in_use = False
        """Cilium is attached by tcx: clsact filters run too late, or are deleted."""
        self._known: dict[int, frozenset[int]] = {}
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._route = AsyncIPRoute()
        await self._route.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._route.__aexit__(*exc)

    async def chains(self) -> dict[str, list[Attachment]]:
        """Return the programs at the ingress of every selected interface, in the order in which they run."""
        async with self._asking_the_kernel():
            return {name: await attachments(self._route, index) for index, name in self._selected()}

    async def ipcaches(self) -> frozenset[int]:
        """Return the ids of the ipcaches that Cilium's programs on these interfaces' ingress look into."""
        theirs: dict[int, Attachment] = {}
        async with self._asking_the_kernel():
            for index, _ in self._selected():
                # Filters must be listed per interface, which is costly, so they are listed only without Cilium on tcx.
                found = _ciliums(tcx_attachments(index)) or _ciliums(
                    await clsact_attachments(self._route, index)
                )
                theirs |= found
        self.tcx_in_use = any(each.style == "tcx" for each in theirs.values())
        known: dict[int, frozenset[int]] = {}
        look_into = functools.cache(_look_into)
        for number in theirs:
            # A loaded program never changes; one without an ipcache may still be being set up.
            known[number] = self._known.get(number, frozenset())
            if not known[number]:
                known[number] = _ipcaches_behind(number, look_into)
                await asyncio.sleep(0)  # when Cilium restarts there are dozens of new ones
        self._known = known
        return frozenset().union(*known.values())

    async def netkit(self) -> list[str]:
        """Return the names of netkit devices, which lazymesh does not support yet."""
        async with self._asking_the_kernel():
            links = [link async for link in await self._route.link("dump", kind="netkit")]
        return sorted(link_name(link) for link in links if link_kind(link) == "netkit")

    async def addresses(self) -> set[Address]:
        """Return all addresses of this node."""
        async with self._asking_the_kernel():
            items = [item async for item in await self._route.addr("dump")]
        found = [item.get_attr("IFA_LOCAL") or item.get_attr("IFA_ADDRESS") for item in items]
        return {parse_address(text) for text in found if text}

    @contextlib.asynccontextmanager
    async def _asking_the_kernel(self) -> AsyncIterator[None]:
        """Take turns, and translate failures, such as a socket too small for the answer: the next attempt may succeed.

        A netlink socket gives one list at a time; if asked for another meanwhile, the kernel says that it is busy.
        """
        async with self._turn:
            try:
                yield
            except (NetlinkError, OSError) as exc:
                raise DatapathError(f"cannot ask the kernel about interfaces and programs: {exc}") from exc

    def _selected(self) -> list[tuple[int, str]]:
        """Return indexes and names, not from if_nameindex(3), which may wait and keeps the interpreter meanwhile."""
        found = []
        for line in _INTERFACES.read_bytes().splitlines()[2:]:
            name = os.fsdecode(line.partition(b":")[0].strip(b" "))  # names need not be UTF-8
            if self._selection.direction_of(name) is not None:
                with contextlib.suppress(OSError):  # it is gone
                    found.append((socket.if_nametoindex(name), name))
        return found


def _ciliums(chain: list[Attachment]) -> dict[int, Attachment]:
    return {each.program_id: each for each in chain if each.name.startswith(_PREFIX)}


def _ipcaches_behind(
    program_id: int, look_into: Callable[[int], tuple[bool, tuple[int, ...]]]
) -> frozenset[int]:
    """Return the ipcaches that a program or one of its tail calls refers to.

    look_into: ``_look_into``, cached during one look at the node: an endpoint has some 35 tail calls, and most of their
    20 maps are the same.
    """
    found: set[int] = set()
    calls: set[int] = set()
    for map_id in _maps_of(program_id):
        is_ipcache, tail_calls = look_into(map_id)
        if is_ipcache:
            found.add(map_id)
        calls.update(tail_calls)
    for call in calls:
        found.update(map_id for map_id in _maps_of(call) if look_into(map_id)[0])
    return frozenset(found)


def _maps_of(program_id: int) -> tuple[int, ...]:
    try:
        return programs.describe_program(program_id).map_ids
    except OSError:  # it was replaced a moment ago
        return ()


def _look_into(map_id: int) -> tuple[bool, tuple[int, ...]]:
    """Return whether a map is an ipcache, and its programs if it is an array of tail calls."""
    with contextlib.suppress(OSError), contextlib.closing(Map.by_id(map_id)) as opened:
        if ipcache_layout_of(opened.layout) is not None:
            return True, ()
        if opened.layout.kind == MAP_TYPE_PROG_ARRAY and opened.layout.max_entries <= _CALLS_MOST:
            return False, tuple(opened.program_ids())
    return False, ()


def is_pinned_here(bpffs: Path) -> bool:
    """Return whether a Cilium agent has pinned its ipcache here; False also without permission to look."""
    return any(os.access(pins_directory(bpffs) / name, os.F_OK) for name in PINS)


def take_out_ours(bpffs: Path, read: Iterable[int] = ()) -> int:
    """Delete all our entries from Cilium's ipcaches; return how many there were.

    read: ids of maps that its programs look into, pinned or not. A map of unknown layout has no entries of ours.
    """
    taken = 0
    for map_id in {*pinned_ipcaches(bpffs).values(), *read}:
        with contextlib.suppress(FileNotFoundError), contextlib.closing(Map.by_id(map_id)) as opened:
            if ipcache_layout_of(opened.layout) is None:
                continue
            ipcache = IpcacheMap(opened, pins_directory(bpffs), TAG)
            for address in list(ipcache.tagged()):
                standing = ipcache.stands(address)
                if standing is not None and standing.tagged:
                    taken += ipcache.delete(address)
    return taken
