"""What the agent needs of a node's ipcaches, and the map of a node without Cilium; ciliumipcaches.py has the other."""

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
    from lazymesh.datapath.ipcachemaps import IpcacheMap
    from lazymesh.datapath.program import Datapath
    from lazymesh.metrics import Metrics
    from lazymesh.roles.driver import Driver
    from lazymesh.roles.mesh import Mesh


class NodeIpcaches(Protocol):
    """The ipcaches of a node that the agent uses."""

    mode: str
    """``standalone`` or ``cilium``."""
    shared: bool
    """Whether Cilium writes there too."""

    @property
    def here(self) -> Container[Address]:
        """The node's own addresses, which no tunnel leads to; empty where tunnels are not used."""

    @property
    def maps(self) -> Sequence[IpcacheMap]:
        """The map that is written for good, then others that programs still read."""

    def connect(self, installer: Installer, driver: Driver, resolver: Resolver, mesh: Mesh) -> None:
        """Start writing; not called in shadow mode."""

    async def run(self) -> None:
        """Follow the maps until cancelled."""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong, a line each."""

    def describe(self) -> dict[str, Any]:
        """Return the maps as an object for ``lazymesh status``."""

    def export(self, metrics: Metrics) -> None:
        """Register the metrics."""


class OwnIpcache:
    """A single map that only lazymesh writes."""

    mode = "standalone"
    shared = False
    here: tuple[Address, ...] = ()

    def __init__(self, datapath: Datapath, size: int, bpffs: Path) -> None:
        self._bpffs = bpffs
        self._size = size
        self._ipcache = open_own_ipcache(datapath.pins, size)
        datapath.visible.show([self._ipcache])

    @property
    def maps(self) -> Sequence[IpcacheMap]:
        """The single map."""
        return (self._ipcache,)

    def connect(self, installer: Installer, driver: Driver, resolver: Resolver, mesh: Mesh) -> None:
        """Do nothing: the driver is the only writer."""

    async def run(self) -> None:
        """Do nothing: the map never changes."""
        await asyncio.Event().wait()

    def problems(self) -> Iterator[str]:
        """Report a Cilium that has come to this node, whose programs never look here, and a map of another size."""
        if is_pinned_here(self._bpffs):
            yield (
                "Cilium has its own ipcache on this node, and nothing is resolved for it: restart this agent with"
                " --datapath cilium (auto chooses only once, at the start)"
            )
        if self._ipcache.max_entries != self._size:
            yield (
                f"the ipcache was made for {self._ipcache.max_entries} entries and keeps that size: --ipcache-size"
                f" {self._size} takes effect after `lazymesh uninstall` on this node, or its next boot"
            )

    def describe(self) -> dict[str, Any]:
        """Return the map."""
        return {"maps": [describe_map(self._ipcache, "own")]}

    def export(self, metrics: Metrics) -> None:
        """Register nothing."""


def describe_map(ipcache: IpcacheMap, role: str) -> dict[str, Any]:
    """Return one map as an object for ``lazymesh status``."""
    return {
        "id": ipcache.map_id,
        "layout": ipcache.layout.words,
        "size": ipcache.max_entries,
        "role": role,
    }
