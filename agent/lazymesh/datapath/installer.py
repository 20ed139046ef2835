"""Writes entries into the ipcache so that no other writer's is touched and a crash at any point loses no ownership.

Order of writes: journal, then ipcache when an entry is installed or replaced; ipcache, then journal when it is evicted.
So a journal line always covers what the map may hold of ours, and ``adopt`` reconciles the two after a crash.

In our own map an entry is ours as long as it equals the journal's. In Cilium's, whose agent may write the very same
value at any time, it is ours as long as it carries our tag. While Cilium restarts there are several maps: the first is
the new one, which the journal describes; older ones get the same entries, and go with their last program.
"""

from __future__ import annotations

import math
from itertools import compress, islice, repeat
from typing import TYPE_CHECKING

from msgspec.structs import replace

from lazymesh.core.identities import WORLD_IDENTITIES, is_peer
from lazymesh.core.model import Reason, with_tunnel_flags
from lazymesh.datapath import abi
from lazymesh.datapath.abi import OwnedEntry
from lazymesh.errors import DatapathError, MapFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

    from lazymesh.core.events import Install
    from lazymesh.core.model import Address, Entry
    from lazymesh.datapath.ipcachemaps import IpcacheMap, Standing
    from lazymesh.datapath.journal import Journal, Writer


FEW = 3
"""Up to this many new entries, two system calls each take no longer: for a batch the kernel has to make a packet."""


class Installer:
    """Installs and evicts our entries.

    shared: Cilium writes to the maps, too, and our entries in them are tagged.
    writer: writes journal and map together; not used if the map is shared, since it writes no tag.
    honours_noexist: the result of ``kernel_honours_noexist``. Without it an insert is guarded by a lookup, which cannot
    tell an exact entry from a shorter prefix with the same value, so anything but world is taken for an exact entry.
    """

    def __init__(
        self,
        maps: Sequence[IpcacheMap],
        journal: Journal,
        honours_noexist: bool,
        *,
        shared: bool = False,
        writer: Writer | None = None,
    ) -> None:
        self.crowded = False
        """The map is nearly full: nothing new is inserted, what is left is for Cilium."""
        self.added = 0
        """How many entries we have added to the first map so far, less those removed."""
        self.added_most = math.inf
        """The limit for that until the map's entries are counted again."""
        self.on_full: Callable[[], None] = lambda: None
        """Called when there was no room for an entry, though the map was not known to be full."""
        self.use(maps)
        self._journal = journal
        self._honours_noexist = honours_noexist
        self._shared = shared
        self._writer = None if shared else writer
        self._owned: dict[Address, tuple[Entry, int]] = {}
        """Our entries in the first map, and the ids of their clusters."""
        self._beside: set[Address] = set()
        """Our entries in old maps only: in the first one Cilium has written its own by now."""

    def owns(self, address: Address) -> bool:
        """Return whether the address' entry in the first map is ours, as far as we know."""
        return address in self._owned

    def owned_addresses(self) -> list[Address]:
        """Return the addresses of our entries, the latest installed first."""
        return [*reversed(self._owned), *self._beside]

    def adopt(self) -> Iterator[tuple[Address, Entry, int]]:
        """Take over an earlier agent's journal; yield address, entry and cluster id of what is still in the map.

        What is in an old map only is carried over: Cilium may have restarted while we did not run. A line whose entry
        is gone, or was replaced by another writer, is deleted. Entries of ours without a line are removed from Cilium's
        maps: nothing would keep them true.
        """
        for address, line in list(self._journal.items()):
            standing = self._main.stands(address)
            if standing is not None and self._is_of_line(standing, line):
                entry = (
                    line.entry if self._main.as_read_back(line.entry) == standing.entry else standing.entry
                )
                self._owned[address] = entry, line.cluster_id
                self._bring_back(address, with_tunnel_flags(entry))
                yield address, entry, line.cluster_id
            elif (
                any(_is_tagged(ipcache, address) for ipcache in self._maps[1:])
                and self.install(address, with_tunnel_flags(line.entry), line.cluster_id) is None
            ):
                yield address, with_tunnel_flags(line.entry), line.cluster_id
            else:
                self._journal.remove(address)
        for ipcache in self._maps if self._shared else ():
            for address in list(ipcache.tagged()):
                if address not in self._owned and address not in self._beside:
                    self.withdraw(ipcache, address)

    def has_leftovers(self) -> bool:
        """Return whether an earlier agent left an entry of ours in Cilium's maps, with or without a journal."""
        return any(True for ipcache in self._maps for _ in ipcache.tagged())

    def use(self, maps: Sequence[IpcacheMap]) -> None:
        """Write to these maps from now on. Our entries in another first map must be carried over."""
        self._maps = list(maps)
        self._main = self._maps[0]

    def carry_over(self, address: Address) -> Reason | None:
        """Put our entry into a new first map; return why not, in which case it is no longer ours."""
        entry, cluster_id = self._owned[address]
        wanted, standing = with_tunnel_flags(entry), self._main.stands(address)
        if standing is not None and standing.tagged and standing.entry == self._main.as_read_back(wanted):
            return None
        return self.install(address, wanted, cluster_id)

    @staticmethod
    def withdraw(ipcache: IpcacheMap, address: Address) -> None:
        """Remove our entry from a Cilium map that is no longer in use: nothing would keep it true."""
        if _is_tagged(ipcache, address):
            ipcache.delete(address)

    def install(self, address: Address, entry: Entry, cluster_id: int) -> Reason | None:
        """Install the entry, new or in place of ours; return why not, or None.

        TAKEN: another writer's entry is there, and tells the programs who the peer is. NOT_OURS: it does not.
        """
        in_old = [self._put_beside(ipcache, address, entry) for ipcache in self._maps[1:]]
        reason = self._put(address, entry, cluster_id)
        if reason is Reason.TAKEN and any(in_old):
            # As long as programs read the old map, our entry there must be kept true.
            self._beside.add(address)
            return None
        if reason is not None:
            self._take_back(address)
        self._beside.discard(address)
        return reason

    def install_many(self, installs: Sequence[Install]) -> list[Reason | None]:
        """Install several addresses, each of which appears once; return why not, or None, for each.

        New entries are written together, each line before its entry; the rest one by one. Nothing is looked up first:
        an address gets an entry because it missed, so the programs have looked.
        """
        count = 0
        for each in installs:
            count += len(each.addresses)
        scarce = self.crowded or self.added + count > self.added_most
        if scarce or not self._honours_noexist or len(self._maps) > 1:
            return self._install_apart(installs)
        if count == 1:
            (one,) = installs
            return [self._install_alone(one.addresses[0], one.entry, one.cluster_id)]
        fresh = self._only_fresh(installs)
        try:
            inserted = self._write(fresh)
        except DatapathError:  # one by one, to see for which there is room
            return self._install_apart(installs)
        added = sum(inserted)
        written = fresh if added == len(inserted) else _only(fresh, inserted)
        for each in written:
            self._owned.update(zip(each.addresses, repeat((each.entry, each.cluster_id))))
            self._beside.difference_update(each.addresses if self._beside else ())
        self.added += added
        if added == count:
            return [None] * count
        return self._install_apart(installs, {address for address, _, _ in _each(written)})

    def _install_alone(self, address: Address, entry: Entry, cluster_id: int) -> Reason | None:
        """Do the same for one address, in fewer calls: a lone miss finds cold caches."""
        inserted = False
        if address not in self._owned:
            line = abi.pack_address_key(address), entry, cluster_id
            try:
                self._journal.write_many((line,))
                (inserted,) = self._main.insert_many((line,))
            except DatapathError:
                pass  # install() says why (contextlib.suppress would be three more calls)
        if not inserted:
            return self.install(address, entry, cluster_id)
        self._owned[address] = entry, cluster_id
        self._beside.discard(address)
        self.added += 1
        return None

    def _install_apart(
        self, installs: Sequence[Install], written: Container[Address] = ()
    ) -> list[Reason | None]:
        """Install one by one those that are not written yet."""
        return [
            None if address in written else self.install(address, entry, cluster_id)
            for address, entry, cluster_id in _each(installs)
        ]

    def _only_fresh(self, installs: Sequence[Install]) -> Sequence[Install]:
        """Leave out addresses that have an entry of ours."""
        owned = self._owned
        if all([owned.keys().isdisjoint(each.addresses) for each in installs]):  # noqa: C419 (as mostly none is owned)
            return installs
        return _only(installs, [address not in owned for address, _, _ in _each(installs)])

    def _write(self, fresh: Sequence[Install]) -> Sequence[bool]:
        if self._writer is not None and sum([len(each.addresses) for each in fresh]) > FEW:
            stand = self._writer.write(fresh)
            written = [known for known in stand if known is not None]
            if len(written) == len(stand):
                return written
            return [
                self._stands_as_written(*each) if known is None else known
                for each, known in zip(_each(fresh), stand, strict=True)
            ]
        lines = [(abi.pack_address_key(address), entry, number) for address, entry, number in _each(fresh)]
        self._journal.write_many(lines)
        return self._main.insert_many(lines)

    def _stands_as_written(self, address: Address, entry: Entry, cluster_id: int) -> bool:
        written, standing = self._main.as_read_back(entry), self._main.stands(address)
        ours = OwnedEntry(written, written, cluster_id)
        return standing is not None and standing.entry == written and self._journal.read(address) == ours

    def evict(self, address: Address) -> bool:
        """Remove our entry if it is still as we wrote it; return whether it was."""
        self._take_back(address)
        self._beside.discard(address)
        # In our own map, what a lookup finds may be a shorter prefix with the same value.
        removed = self._is_ours(address, self._main.stands(address)) and self._main.delete(address)
        self.added -= removed
        self._forget(address)
        return removed

    def is_lost(self, address: Address) -> bool:
        """Return whether our entry is gone: removed, or overwritten by the map's owner."""
        if address in self._beside:
            return len(self._maps) == 1
        return address in self._owned and not self._is_ours(address, self._main.stands(address))

    def forget(self, address: Address) -> None:
        """Drop an entry that is lost."""
        self._beside.discard(address)
        self._forget(address)

    def _insert(self, address: Address, entry: Entry, cluster_id: int) -> bool:
        if self.crowded or self.added >= self.added_most:
            raise MapFullError("the ipcache map is nearly full, and what is left is for Cilium")
        self._journal.write(address, OwnedEntry(entry, entry, cluster_id))
        inserted = self._main.insert(address, entry)
        self.added += inserted
        return inserted

    def _put(self, address: Address, entry: Entry, cluster_id: int) -> Reason | None:
        standing = self._main.stands(address)
        try:
            if self._is_ours(address, standing):
                previous = standing.entry if standing else entry
                self._journal.write(address, OwnedEntry(entry, previous, cluster_id))
                standing = self._main.stands(address)  # the map's owner may have written meanwhile
            if self._is_ours(address, standing):
                self._main.replace(address, entry)
            elif self._is_foreign(standing, entry) or not self._insert(address, entry, cluster_id):
                self._forget(address)
                return self._whose(address)
        except MapFullError:
            self._settle(address)
            if not self.crowded:
                self.on_full()
            return Reason.MAP_FULL
        except DatapathError:
            self._settle(address)
            return Reason.INSTALL_FAILED
        self._owned.pop(address, None)
        self._owned[address] = entry, cluster_id
        return None

    def _put_beside(self, ipcache: IpcacheMap, address: Address, entry: Entry) -> bool:
        """Put the entry into an old map, for programs that still read it; return whether it is there."""
        standing = ipcache.stands(address)
        try:
            if standing is not None and standing.tagged:
                ipcache.replace(address, entry)
                return True
            return not self._is_foreign(standing, entry) and ipcache.insert(address, entry)
        except DatapathError:  # no worse than before
            return False

    def _bring_back(self, address: Address, entry: Entry) -> None:
        """Make old maps hold our entry as the first one does; a crash may have left something newer there."""
        for ipcache in self._maps[1:]:
            standing = ipcache.stands(address)
            if standing is not None and standing.tagged and standing.entry != ipcache.as_read_back(entry):
                self._put_beside(ipcache, address, entry)

    def _take_back(self, address: Address) -> None:
        """Remove our entry from the old maps."""
        for ipcache in self._maps[1:]:
            self.withdraw(ipcache, address)

    def _is_ours(self, address: Address, standing: Standing | None) -> bool:
        if standing is None or self._shared:
            return standing is not None and standing.tagged
        mine = self._owned.get(address)
        return mine is not None and standing.entry == self._main.as_read_back(mine[0])

    def _is_of_line(self, standing: Standing, line: OwnedEntry) -> bool:
        return standing.tagged if self._shared else standing.entry in (line.entry, line.previous)

    def _is_foreign(self, standing: Standing | None, entry: Entry) -> bool:
        """Return whether what a lookup found belongs to another writer, as far as a lookup can tell.

        In our own map, one that equals ours must not get a journal line even for a moment: after a crash in that moment
        we would take it for ours.
        """
        if standing is None or standing.tagged:
            return False
        if not self._shared and standing.entry == entry:
            return True
        return not self._honours_noexist and standing.entry.identity not in WORLD_IDENTITIES

    def _whose(self, address: Address) -> Reason:
        standing = self._main.stands(address)
        known = self._shared and standing is not None and is_peer(standing.entry.identity)
        return Reason.TAKEN if known else Reason.NOT_OURS

    def _settle(self, address: Address) -> None:
        """After a failed write, keep the line if our entry is still there, else delete it."""
        if not self._is_ours(address, self._main.stands(address)):
            self._forget(address)

    def _forget(self, address: Address) -> None:
        self._owned.pop(address, None)
        self._journal.remove(address)


def _only(installs: Iterable[Install], wanted: Iterable[bool]) -> list[Install]:
    """Return the installs with only the wanted ones of their addresses."""
    left = iter(wanted)
    return [
        replace(each, addresses=list(compress(each.addresses, islice(left, len(each.addresses)))))
        for each in installs
    ]


def _each(installs: Iterable[Install]) -> Iterator[tuple[Address, Entry, int]]:
    for each in installs:
        for address in each.addresses:
            yield address, each.entry, each.cluster_id


def _is_tagged(ipcache: IpcacheMap, address: Address) -> bool:
    standing = ipcache.stands(address)
    return standing is not None and standing.tagged
