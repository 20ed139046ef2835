"""Writes entries into the ipcache so that nobody else's is ever touched and a crash at any point loses no ownership.

Order of writes: journal, then ipcache when an entry is installed or replaced; ipcache, then journal when it is evicted.
A journal line therefore always covers what the map may hold of ours, and ``adopt`` sorts it out after a crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.core.identities import WORLD_IDENTITIES
from lazymesh.core.model import Reason
from lazymesh.datapath.abi import OwnedEntry
from lazymesh.errors import DatapathError, MapFullError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.core.model import Address, Entry
    from lazymesh.datapath.maps import IpcacheMap, Journal


class Installer:
    """Installs and evicts our entries in one ipcache map.

    honours_noexist: what ``kernel_honours_noexist`` found. Without it an insert is guarded by a lookup, which cannot
    see an exact entry behind an equal answer of a shorter prefix, so everything that is not world is taken for one.
    """

    def __init__(self, ipcache: IpcacheMap, journal: Journal, honours_noexist: bool) -> None:
        self._ipcache = ipcache
        self._journal = journal
        self._honours_noexist = honours_noexist
        self._owned: dict[Address, Entry] = {}

    @property
    def owned(self) -> int:
        """How many entries of the map are ours."""
        return len(self._owned)

    def adopt(self) -> Iterator[tuple[Address, Entry, int]]:
        """Take over the journal of an earlier life; yield address, entry and cluster id of what still stands.

        A line whose entry is gone, or was replaced by somebody else's, is struck out.
        """
        for address, line in list(self._journal.items()):
            standing = self._ipcache.lookup(address)
            if standing is not None and standing in (line.entry, line.previous):
                self._owned[address] = standing
                yield address, standing, line.cluster_id
            else:
                self._journal.remove(address)

    def install(self, address: Address, entry: Entry, cluster_id: int) -> Reason | None:
        """Put the entry into the map, new or in place of ours; returns why not, or None."""
        mine, standing = self._owned.get(address), self._ipcache.lookup(address)
        try:
            if mine is not None and standing == mine:
                self._journal.write(address, OwnedEntry(entry, mine, cluster_id))
                self._ipcache.replace(address, entry)
            elif self._is_foreign(standing, entry):
                self._forget(address)
                return Reason.NOT_OURS
            else:
                self._journal.write(address, OwnedEntry(entry, entry, cluster_id))
                if not self._ipcache.insert(address, entry):
                    self._forget(address)
                    return Reason.NOT_OURS
        except MapFullError:
            self._settle(address, mine)
            return Reason.MAP_FULL
        except DatapathError:
            self._settle(address, mine)
            return Reason.INSTALL_FAILED
        self._owned[address] = entry
        return None

    def evict(self, address: Address) -> bool:
        """Remove our entry if it still is what we wrote; True when it was."""
        mine = self._owned.get(address)
        standing = mine is not None and self._ipcache.lookup(address) == mine
        if standing:
            self._ipcache.delete(address)
        self._forget(address)
        return standing

    def _is_foreign(self, standing: Entry | None, entry: Entry) -> bool:
        """Tell whether the answer that stands belongs to somebody else, as far as a lookup can say.

        One that equals ours must not get a line in the journal, not even for a moment: after a crash in that moment
        we would take it for ours.
        """
        if standing is None:
            return False
        return standing == entry or not (self._honours_noexist or standing.identity in WORLD_IDENTITIES)

    def _settle(self, address: Address, mine: Entry | None) -> None:
        """After a failed write: keep the line of an entry that still stands, strike out any other."""
        if mine is None or self._ipcache.lookup(address) != mine:
            self._forget(address)

    def _forget(self, address: Address) -> None:
        self._owned.pop(address, None)
        self._journal.remove(address)
