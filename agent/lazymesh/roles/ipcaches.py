"""Where entries go: an ipcache of our own, on a node without Cilium. Beside Cilium it is ``guest``'s."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from lazymesh.datapath.cilium import is_pinned_here
from lazymesh.datapath.program import open_own_ipcache

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence
    from pathlib import Path

    from lazymesh.core.model import Address
    from lazymesh.core.resolver import Resolver
    from lazymesh.datapath.installer import Installer
    from lazymesh.datapath.maps import IpcacheMap
    from lazymesh.datapath.program import Datapath
    from lazymesh.metrics import Metrics
    from lazymesh.roles.driver import Driver
    from lazymesh.roles.mesh import Mesh


class NodeIpcaches(Protocol):
    """The ipcaches of a node, as the agent has them."""

    mode: str
    """``standalone`` or ``cilium``."""
    shared: bool
    """Somebody else writes there too."""

    @property
    def here(self) -> Container[Address]:
        """The node's own addresses, which no tunnel leads to; empty where there are no tunnels."""

    @property
    def maps(self) -> Sequence[IpcacheMap]:
        """The map that is written for good, then others that programs still read."""

    def connect(self, installer: Installer, driver: Driver, resolver: Resolver, mesh: Mesh) -> None:
        """Say who writes; without this, in shadow mode, nothing is ever written."""

    async def run(self) -> None:
        """Follow the maps until cancelled."""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong, a line each."""

    def describe(self) -> dict[str, Any]:
        """Return what there is to see, as an object for people."""

    def export(self, metrics: Metrics) -> None:
        """Register what is counted."""


class OwnIpcache:
    """One map, and nobody else's."""

    mode = "standalone"
    shared = False
    here: tuple[Address, ...] = ()

    def __init__(self, datapath: Datapath, size: int, bpffs: Path) -> None:
        self._bpffs = bpffs
        self._size = size
        self._ipcache = open_own_ipcache(datapath.pins, size)
        datapath.views.show([self._ipcache])

    @property
    def maps(self) -> Sequence[IpcacheMap]:
        """The one."""
        return (self._ipcache,)

    def connect(self, installer: Installer, driver: Driver, resolver: Resolver, mesh: Mesh) -> None:
        """Nobody but the driver writes here."""

    async def run(self) -> None:
        """Do nothing: it stays where it is."""
        await asyncio.Event().wait()

    def problems(self) -> Iterator[str]:
        """Say if a Cilium has come to this node, whose programs never look here, or the map has another size."""
        if is_pinned_here(self._bpffs):
            yield (
                "Cilium has an ipcache of its own on this node, and nothing is resolved for it: restart this agent with"
                " --datapath cilium (auto chooses only once, at the start)"
            )
        if self._ipcache.max_entries != self._size:
            yield (
                f"the ipcache was made for {self._ipcache.max_entries} entries and keeps them: --ipcache-size"
                f" {self._size} counts after `lazymesh uninstall` on this node, or its next boot"
            )

    def describe(self) -> dict[str, Any]:
        """Show the map."""
        return {"maps": [describe_map(self._ipcache, "own")]}

    def export(self, metrics: Metrics) -> None:
        """There is nothing to count."""


def describe_map(ipcache: IpcacheMap, role: str) -> dict[str, Any]:
    """Return one map for people."""
    return {
        "id": ipcache.map_id,
        "layout": ipcache.view.words,
        "size": ipcache.max_entries,
        "role": role,
    }
