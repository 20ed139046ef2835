"""Reads the pinned ipcache map and journal for people; needs no agent and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.core.model import format_address, parse_address
from lazymesh.datapath.maps import IpcacheMap, Journal, open_map
from lazymesh.datapath.pins import IPCACHE, Pins
from lazymesh.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazymesh.core.model import Address, Entry
    from lazymesh.datapath.abi import OwnedEntry


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


class IpcacheView:
    """A look at the map behind ``<bpffs>/lazymesh``."""

    def __init__(self, ipcache: IpcacheMap, journal: Journal) -> None:
        self._ipcache = ipcache
        self._journal = journal

    @classmethod
    def open(cls, bpffs: Path) -> IpcacheView:
        """Open the pins; DatapathError when they are missing or of an unknown layout."""
        pins = Pins.under(bpffs)
        return cls(IpcacheMap.pinned(pins.path(IPCACHE)), Journal(open_map(pins.path("lm_owned"))))

    def rows(self) -> Iterator[Row]:
        """Yield every entry in the map's order."""
        owned = dict(self._journal.items())
        for network, cluster_id, entry in self._ipcache.items():
            line = owned.get(network.network_address.packed) if network.num_addresses == 1 else None
            yield _row(f"{network}@{cluster_id}" if cluster_id else str(network), entry, line)

    def get(self, text: str) -> Row | None:
        """Return the longest-prefix answer for an address; SettingsError if the text is none."""
        try:
            address = parse_address(text)
        except ValueError as exc:
            raise SettingsError(f"{text!r} is no IP address") from exc
        entry = self._ipcache.lookup(address)
        return None if entry is None else _row(format_address(address), entry, self._line_of(address))

    def _line_of(self, address: Address) -> OwnedEntry | None:
        return self._journal.read(address)


def _row(prefix: str, entry: Entry, line: OwnedEntry | None) -> Row:
    ours = line is not None and entry in (line.entry, line.previous)
    endpoint = format_address(entry.tunnel_endpoint) if entry.tunnel_endpoint else "0.0.0.0"  # noqa: S104
    owner = "lazymesh" if ours else "other"
    return Row(prefix, entry.identity, endpoint, entry.encrypt_key, entry.flags, owner)
