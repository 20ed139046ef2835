"""Whose an entry is: ours, or somebody else's."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, cast

import pytest

from lazymesh.core.model import Address, Entry, Network, parse_address
from lazymesh.datapath.abi import OwnedEntry
from lazymesh.datapath.ipcachemaps import Standing
from lazymesh.errors import SettingsError
from lazymesh.roles.ipcachereader import IpcacheReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.datapath.ipcachemaps import IpcacheMap
    from lazymesh.datapath.journal import Journal

OURS, THEIRS = Entry(131_073, parse_address("172.18.0.2"), 0, 2), Entry(2)
IP, OTHER = parse_address("10.2.0.5"), parse_address("fd00::5")


class FakeMap:
    """Entries by prefix."""

    def __init__(self, entries: dict[str, Entry], cluster_id: int = 0) -> None:
        self._entries = entries
        self._cluster_id = cluster_id

    def items(self) -> Iterator[tuple[Network, int, Standing]]:
        """Yield all."""
        for prefix, entry in self._entries.items():
            yield (
                ipaddress.ip_network(prefix),
                self._cluster_id,
                Standing(entry, tagged=entry.encrypt_key == 9),
            )

    def stands(self, address: Address) -> Standing | None:
        """Know single addresses only."""
        entry = self._entries.get(str(ipaddress.ip_network(address)))
        return None if entry is None else Standing(entry, tagged=False)


class FakeJournal(dict[Address, OwnedEntry]):
    """Lines by address."""

    def read(self, address: Address) -> OwnedEntry | None:
        """Return a line."""
        return self.get(address)


def reader(entries: dict[str, Entry], lines: dict[Address, OwnedEntry], cluster_id: int = 0) -> IpcacheReader:
    """Return a reader of fakes."""
    fake = cast("IpcacheMap", FakeMap(entries, cluster_id))
    return IpcacheReader(fake, cast("Journal", FakeJournal(lines)))


def test_entry_is_ours_while_it_is_what_the_journal_says() -> None:
    """The line before a replacement counts too; a stranger's entry under our line is the stranger's."""
    lines = {IP: OwnedEntry(OURS, THEIRS, 2)}
    for entry, owner in ((OURS, "lazymesh"), (THEIRS, "lazymesh"), (Entry(77), "other")):
        (row,) = reader({"10.2.0.5/32": entry}, lines).rows()
        assert (row.prefix, row.owner) == ("10.2.0.5/32", owner)


def test_entry_in_the_map_of_cilium_is_ours_while_it_is_tagged() -> None:
    """There is no journal that could be asked: the value says it."""
    entries = {"10.2.0.5/32": Entry(131_073, encrypt_key=9), "10.2.0.6/32": OURS}
    rows = IpcacheReader(cast("IpcacheMap", FakeMap(entries))).rows()
    assert [row.owner for row in rows] == ["lazymesh", "other"]


def test_prefixes_are_never_ours() -> None:
    """Not even one that starts with an address of ours."""
    (row,) = reader({"10.2.0.0/24": OURS}, {parse_address("10.2.0.0"): OwnedEntry(OURS, OURS, 2)}).rows()
    assert row.owner == "other"


def test_cluster_id_of_a_key_is_shown() -> None:
    """As Cilium does, behind an @."""
    (row,) = reader({"10.2.0.0/24": OURS}, {}, 7).rows()
    assert row.prefix == "10.2.0.0/24@7"


def test_get_asks_as_the_datapath_does() -> None:
    """Text that is no address is wrong usage."""
    row = reader({"fd00::5/128": THEIRS}, {}).get("fd00:0::5")
    assert row is not None
    assert (row.prefix, row.tunnel_endpoint) == ("fd00::5", "0.0.0.0")
    assert reader({}, {}).get("10.2.0.5") is None
    with pytest.raises(SettingsError):
        reader({}, {}).get("host")
