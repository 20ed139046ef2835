"""Whose an entry is: ours, or somebody else's."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, cast

import pytest

from lazymesh.core.model import Address, Entry, Network, parse_address
from lazymesh.datapath.maps import Standing
from lazymesh.errors import SettingsError
from lazymesh.roles.inspect import IpcacheView

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.datapath.maps import IpcacheMap

OURS, THEIRS = Entry(131_073, parse_address("172.18.0.2"), 0, 2), Entry(2)


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


def view(entries: dict[str, Entry], cluster_id: int = 0) -> IpcacheView:
    """Return a view of fakes."""
    return IpcacheView(cast("IpcacheMap", FakeMap(entries, cluster_id)))


def test_entry_is_ours_while_it_is_tagged() -> None:
    """There is no journal that is asked: the value says it, in whosever map."""
    rows = view({"10.2.0.5/32": Entry(131_073, encrypt_key=9), "10.2.0.6/32": OURS}).rows()
    assert [(row.prefix, row.owner) for row in rows] == [
        ("10.2.0.5/32", "lazymesh"),
        ("10.2.0.6/32", "other"),
    ]


def test_cluster_id_of_a_key_is_shown() -> None:
    """As Cilium does, behind an @."""
    (row,) = view({"10.2.0.0/24": OURS}, 7).rows()
    assert row.prefix == "10.2.0.0/24@7"


def test_get_asks_as_the_datapath_does() -> None:
    """Text that is no address is wrong usage."""
    row = view({"fd00::5/128": THEIRS}).get("fd00:0::5")
    assert row is not None
    assert (row.prefix, row.tunnel_endpoint) == ("fd00::5", "0.0.0.0")
    assert view({}).get("10.2.0.5") is None
    with pytest.raises(SettingsError):
        view({}).get("host")
