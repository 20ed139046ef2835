"""Reads the ipcache for ``lazymesh ipcache``; needs no agent and writes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.core.model import format_address, parse_address
from lazymesh.datapath.cilium import TAG, pinned_ipcaches
from lazymesh.datapath.ipcachemaps import IpcacheMap
from lazymesh.datapath.journal import Journal
from lazymesh.datapath.maps import open_map
from lazymesh.datapath.pins import IPCACHE, JOURNAL, Pins
from lazymesh.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from lazymesh.core.model import Address
    from lazymesh.datapath.abi import OwnedEntry
    from lazymesh.datapath.ipcachemaps import Standing


@dataclass(frozen=True, slots=True)
class Row:
    """One entry, ready to be shown."""

    prefix: str
    identity: int
    tunnel_endpoint: str
    """``0.0.0.0`` for none, as Cilium prints it."""
    encrypt_key: int
    flags: int
    owner: str
    """``lazymesh`` or ``other``."""
    stale: bool = False
    """It is lazymesh's, and in use although its cluster does not confirm it now."""


class IpcacheReader:
    """Reads the map that lazymesh writes, or would: its own, or the running Cilium agent's.

    In our own map an entry is ours while it equals what the journal says, in Cilium's while it carries our tag.
    """

    def __init__(
        self, ipcache: IpcacheMap, journal: Journal | None = None, stale: Collection[str] = ()
    ) -> None:
        """Journal: that of our own map, or None for Cilium's. Stale: addresses that the agent reports as stale."""
        self._ipcache = ipcache
        self._journal = journal
        self._stale = {parse_address(text) for text in stale}

    @classmethod
    def open(cls, bpffs: Path, stale: Collection[str] = ()) -> IpcacheReader:
        """Open the pinned maps; DatapathError if there are none, or they cannot be read."""
        pins = Pins.under(bpffs)
        if not os.access(pins.path(IPCACHE), os.F_OK) and (pinned := pinned_ipcaches(bpffs)):
            # Each start of Cilium's agent makes a new map, and ids only grow: the highest is the running agent's.
            path = max(pinned, key=pinned.__getitem__)
            return cls(IpcacheMap.pinned(path, TAG, read_only=True), None, stale)
        return cls(IpcacheMap.pinned(pins.path(IPCACHE)), Journal(open_map(pins.path(JOURNAL))), stale)

    def rows(self) -> Iterator[Row]:
        """Yield every entry, in the map's order."""
        lines = {} if self._journal is None else dict(self._journal.items())
        for network, cluster_id, standing in self._ipcache.items():
            address = network.network_address.packed if network.num_addresses == 1 else None
            prefix = f"{network}@{cluster_id}" if cluster_id else str(network)
            yield self._row(prefix, standing, lines.get(address) if address else None, address)

    def get(self, text: str) -> Row | None:
        """Return the longest-prefix match for an address; SettingsError if the text is not an address."""
        try:
            address = parse_address(text)
        except ValueError as exc:
            raise SettingsError(f"{text!r} is not an IP address") from exc
        standing = self._ipcache.stands(address)
        if standing is None:
            return None
        line = self._journal.read(address) if self._journal else None
        return self._row(format_address(address), standing, line, address)

    def _row(self, prefix: str, standing: Standing, line: OwnedEntry | None, address: Address | None) -> Row:
        entry = standing.entry
        ours = standing.tagged or (line is not None and entry in (line.entry, line.previous))
        endpoint = format_address(entry.tunnel_endpoint) if entry.tunnel_endpoint else "0.0.0.0"  # noqa: S104
        owner = "lazymesh" if ours else "other"
        stale = ours and address in self._stale
        return Row(prefix, entry.identity, endpoint, entry.encrypt_key, entry.flags, owner, stale)
