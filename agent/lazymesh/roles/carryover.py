"""Our entries in Cilium's maps: carried over to a new one, given up when Cilium takes them, removed from old ones.

Which maps count is decided in ciliumipcaches.py; the installer knows how to write one without touching Cilium's own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazymesh.core import events
from lazymesh.core.identities import is_peer
from lazymesh.core.model import Reason, with_tunnel_flags

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lazymesh.core.model import Address, Entry
    from lazymesh.core.resolver import Resolver
    from lazymesh.datapath.installer import Installer
    from lazymesh.datapath.ipcachemaps import IpcacheMap
    from lazymesh.roles.driver import Driver
    from lazymesh.roles.mesh import Mesh

SLICE = 200
"""Entries handled between two looks at what else there is to do."""


@dataclass(slots=True)
class CarryOver:
    """Fills new maps, and removes our entries where they no longer belong."""

    installer: Installer
    driver: Driver
    resolver: Resolver
    mesh: Mesh
    outcomes: Counter[str] = field(default_factory=Counter)
    """Entries meant for new maps, by what became of them."""

    def fill(self, recent: Sequence[Address], old: Sequence[IpcacheMap]) -> Iterator[None]:
        """Fill a new map, in steps: with the peers this node has talked to, latest first, then with all our entries."""
        wanted = dict.fromkeys([*recent, *self.installer.owned_addresses()])
        for count, address in enumerate(wanted, 1):
            fate = self._put(address, old)
            if fate is not None:
                self.outcomes[fate] += 1
            if count % SLICE == 0:
                yield
        # In the order of installation, those used most recently would be the first to go again.
        self.driver.feed(events.Used(tuple(reversed(wanted))))

    def withdraw_all(self, gone: Sequence[IpcacheMap]) -> Iterator[None]:
        """Remove our entries from maps that no longer count, in steps: not every such map dies at once."""
        for count, address in enumerate(self.installer.owned_addresses(), 1):
            for ipcache in gone:
                self.installer.withdraw(ipcache, address)
            if count % SLICE == 0:
                yield

    def give_up_if_lost(self, address: Address) -> None:
        """Give up an entry that is no longer ours."""
        if self.installer.is_lost(address):
            self.installer.forget(address)
            self.driver.feed(events.Lost((address,)))

    def _put(self, address: Address, old: Sequence[IpcacheMap]) -> str | None:
        """Put an address into the new map, as ours or as the old maps know it; return what became of it, or None."""
        if self.installer.owns(address):
            reason = self.installer.carry_over(address)
            if reason is not None:
                self.driver.feed(events.Lost((address,)))
            return _fate("carried", reason)
        if self.resolver.describe(address) is not None:
            return None  # it is being resolved, or there is no such pod
        if self.resolver.room <= 0:
            return None  # it would push out a more recent peer
        known = self._known(address, old)
        if known is None:
            return None
        entry, cluster_id = known
        reason = self.installer.install(address, entry, cluster_id)
        if reason is None:
            self.driver.feed(events.Adopted(address, entry, cluster_id))
        return _fate("warmed", reason)

    def _known(self, address: Address, old: Sequence[IpcacheMap]) -> tuple[Entry, int] | None:
        """Return a peer's entry in the old maps and its cluster id; None if no cluster of the mesh would confirm it."""
        owners = self.mesh.table.owners(address)
        info = self.mesh.table.cluster(owners[0]) if len(owners) == 1 else None
        if info is None:
            return None
        for ipcache in old:
            entry = ipcache.lookup(address)
            if entry is None or not is_peer(entry.identity):
                continue
            if entry.identity in info.identities and entry.identity in self.mesh.identities:
                return with_tunnel_flags(entry), info.cluster_id
        return None


def _fate(well: str, reason: Reason | None) -> str:
    if reason is None:
        return well
    return "taken" if reason in (Reason.TAKEN, Reason.NOT_OURS) else "refused"
