"""What becomes of entries when Cilium makes a new map; how they are written, on real maps: in the datapath tier."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.core.events import Adopted, Lost, Used
from lazymesh.core.model import Entry, Reason
from lazymesh.core.resolver import Judge, Limits, Resolver
from lazymesh.roles.carryover import SLICE, CarryOver
from tests.support.playbook import B1, B2, B3, CLAIMED_TWICE, STRANGER, WEB, WEB_OF_C, entry, mesh, said_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.core.model import Address


class Installs:
    """Stands in for the installer: owns some, and refuses what the test says."""

    def __init__(self, *owned: Address) -> None:
        self.owned = list(owned)
        self.put: dict[Address, tuple[Entry, int]] = {}
        self.reason: Reason | None = None
        self.lost: set[Address] = set()
        self.withdrawn: list[tuple[Any, Address]] = []

    def owns(self, address: Address) -> bool:
        """Some are ours already."""
        return address in self.owned

    def owned_addresses(self) -> list[Address]:
        """All that are ours."""
        return list(self.owned)

    def carry_over(self, _address: Address) -> Reason | None:
        """Into the new map."""
        return self.reason

    def install(self, address: Address, entry: Entry, cluster_id: int) -> Reason | None:
        """Put one in."""
        self.put[address] = entry, cluster_id
        return self.reason

    def withdraw(self, ipcache: Any, address: Address) -> None:
        """Take one out of a map."""
        self.withdrawn.append((ipcache, address))

    def is_lost(self, address: Address) -> bool:
        """Somebody has written over it."""
        return address in self.lost

    def forget(self, address: Address) -> None:
        """It is not ours any more."""
        self.owned.remove(address)


class Node:
    """Entries that are carried over, and what the resolver is told."""

    def __init__(self, *owned: Address, tracked: Sequence[Address] = ()) -> None:
        self.installs = Installs(*owned)
        self.told: list[Any] = []
        others = SimpleNamespace(
            feed=self.told.append,
            owned=1_000,
            room=1_000,
            describe=lambda address: address if address in tracked else None,
            table=mesh(),
            identities={WEB, WEB_OF_C},
        )
        self.carry_over = CarryOver(cast("Any", self.installs), *[cast("Any", others)] * 3)

    def fill(self, recent: Sequence[Address], old: dict[Address, Entry] | None = None) -> None:
        """Fill a new map; what the old one says of whom."""
        for _ in self.carry_over.fill(recent, [cast("Any", SimpleNamespace(lookup=(old or {}).get))]):
            pass


def test_peers_talked_to_last_are_the_last_to_go_again() -> None:
    """They are put in first, so by the order of installation they would be the first."""
    node = Node(B1, B2, B3)
    node.fill([B3, B1])
    assert node.told == [Used((B2, B1, B3))]
    assert node.carry_over.outcomes == {"carried": 3}


def test_peer_is_carried_over_as_the_old_map_knew_it() -> None:
    """With the bits that its layout may not have had; the resolver confirms it with its cluster."""
    node = Node()
    node.fill([B1], {B1: Entry(WEB, entry().tunnel_endpoint)})
    assert node.installs.put == {B1: (entry(), 2)}
    assert node.told == [Adopted(B1, entry(), 2), Used((B1,))]
    assert node.carry_over.outcomes == {"warmed": 1}


def test_no_more_peers_are_carried_over_than_the_budget_has_room_for() -> None:
    """Each one beyond it would push out the one that was put in first, and talked to last."""
    node = Node()
    resolver = Resolver(Limits(owned=2), Judge(mesh(), {WEB}))
    node.carry_over.resolver = resolver
    node.carry_over.driver = cast("Any", SimpleNamespace(feed=lambda event: said_to(resolver, event, 0.0)))
    node.fill([B1, B2, B3], dict.fromkeys([B1, B2, B3], entry()))
    assert node.installs.put.keys() == {B1, B2}
    assert resolver.owned == 2


@pytest.mark.parametrize(
    ("address", "old"),
    [
        pytest.param(B1, None, id="nobody knew it"),
        pytest.param(B1, Entry(2), id="it was world"),
        pytest.param(B1, entry(WEB_OF_C), id="its identity is another cluster's"),
        pytest.param(B1, entry(WEB + 99), id="its identity is not known any more"),
        pytest.param(CLAIMED_TWICE, entry(), id="two clusters claim it"),
        pytest.param(STRANGER, entry(), id="no cluster does"),
        pytest.param(B2, entry(), id="it is being resolved"),
    ],
)
def test_what_no_cluster_of_the_mesh_would_confirm_is_not_carried_over(
    address: Address, old: Entry | None
) -> None:
    """It is a miss like any other."""
    node = Node(tracked=[B2])
    node.fill([address], {} if old is None else {address: old})
    assert (node.installs.put, dict(node.carry_over.outcomes)) == ({}, {})
    assert node.told == [Used((address,))]


@pytest.mark.parametrize(
    ("reason", "fate"), [(Reason.TAKEN, "taken"), (Reason.NOT_OURS, "taken"), (Reason.MAP_FULL, "refused")]
)
def test_what_the_new_map_does_not_take_is_counted(reason: Reason, fate: str) -> None:
    """Ours is lost then, and a peer that was to be carried over was never ours."""
    node = Node(B1)
    node.installs.reason = reason
    node.fill([B1, B2], {B2: entry()})
    assert node.carry_over.outcomes == {fate: 2}
    assert node.told == [Lost((B1,)), Used((B2, B1))]


def test_entry_that_cilium_has_written_over_is_let_go() -> None:
    """Silently: it has its own now."""
    node = Node(B1, B2)
    node.installs.lost = {B1}
    for address in (B1, B2):
        node.carry_over.give_up_if_lost(address)
    assert node.told == [Lost((B1,))]
    assert node.installs.owned == [B2]


def test_everything_of_ours_is_taken_out_of_every_map_that_does_not_count_any_more() -> None:
    """Several may have gone at once."""
    node = Node(B1, B2)
    for _ in node.carry_over.withdraw_all([cast("Any", "old"), cast("Any", "older")]):
        pass
    assert node.installs.withdrawn == [(one, address) for address in (B1, B2) for one in ("old", "older")]


def test_filling_and_leaving_a_map_let_others_have_their_turn() -> None:
    """All at once would block the event loop for as long as there are entries."""
    addresses = [bytes((10, 2, number >> 8, number & 255)) for number in range(3 * SLICE + 1)]
    node = Node(*addresses)
    assert list(node.carry_over.fill([], [])) == [None] * 3
    assert list(node.carry_over.withdraw_all([cast("Any", "old")])) == [None] * 3
    assert node.carry_over.outcomes == {"carried": len(addresses)}
    assert node.installs.withdrawn == [("old", address) for address in addresses]


@pytest.mark.parametrize(
    "before", [Entry(2), entry(WEB_OF_C), entry(WEB + 99)], ids=["world", "another cluster's", "unknown"]
)
def test_peer_that_one_old_map_does_not_know_is_looked_up_in_the_next(before: Entry) -> None:
    """Some of Cilium's programs read either."""
    node = Node()
    old = [cast("Any", SimpleNamespace(lookup={B1: each}.get)) for each in (before, entry())]
    for _ in node.carry_over.fill([B1], old):
        pass
    assert node.installs.put == {B1: (entry(), 2)}
