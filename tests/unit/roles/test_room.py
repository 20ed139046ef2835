"""What counts of Cilium's map lead to; the counting itself: in test_ciliumipcaches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from lazymesh.core.events import Shrink
from lazymesh.roles.room import SHED_AT_ONCE, MapRoom

if TYPE_CHECKING:
    from collections.abc import Callable


class Installs:
    """What the installer is told."""

    def __init__(self) -> None:
        self.crowded = False
        self.added, self.added_most = 0, math.inf
        self.on_full: Callable[[], None] = lambda: None


class Node:
    """A map's room, and what the resolver is told."""

    def __init__(self) -> None:
        self.installs = Installs()
        self.told: list[Any] = []
        others = SimpleNamespace(feed=self.told.append, owned=1_000)
        self.room = MapRoom(cast("Any", None), cast("Any", self.installs), *[cast("Any", others)] * 2)

    def counted(self, used: int, added: int = 0) -> None:
        """Take a count of a map of a hundred entries; added: what our account said when it began."""
        for _ in self.room.limit(used, 100, added):
            pass


def test_map_without_room_gets_nothing_new_and_sheds_what_is_too_much() -> None:
    """Until there is room again."""
    node = Node()
    node.counted(50)
    assert not node.installs.crowded
    node.counted(97)
    assert node.installs.crowded
    assert node.told == [Shrink(4)]
    node.counted(50)
    assert not node.installs.crowded


def test_nothing_is_shed_where_nothing_is_ours() -> None:
    """Cilium has filled the map."""
    node = Node()
    cast("Any", node.room._resolver).owned = 0
    node.counted(97)
    assert node.installs.crowded
    assert node.told == []


def test_what_is_too_much_goes_in_steps() -> None:
    """All at once would block the event loop for a third of a second; a new map ends it."""
    node = Node()
    steps = node.room.limit(97_500, 100_000, 0)
    assert next(steps, True) is None
    assert node.told == [Shrink(SHED_AT_ONCE)]
    assert list(steps) == [None] * (4_500 // SHED_AT_ONCE)
    assert node.told == [Shrink(SHED_AT_ONCE)] * (4_500 // SHED_AT_ONCE) + [Shrink(4_500 % SHED_AT_ONCE)]
    node.told.clear()
    for _ in node.room.limit(97_500, 100_000, 0):
        node.room.begin()
    assert node.told == [Shrink(SHED_AT_ONCE)]


def test_no_more_of_ours_comes_than_there_was_room_for_at_the_last_count() -> None:
    """What came while the map was counted may not be in the count."""
    node = Node()
    node.installs.added = 30
    node.counted(60, added=20)
    assert node.installs.added_most == 20 + 35
    assert node.room.pause(100) == node.room._room.pause(100, 10)
    for _ in node.room.limit(850_000, 1_000_000, 20):
        pass
    assert node.room.pause(1_000_000) == node.room._room.pause(1_000_000, 10)
    assert node.room.pause(1_000_000) > node.room._room.pause(1_000_000, 30)
    node.room.begin()
    assert node.installs.added_most == math.inf


def test_new_map_is_counted_at_once() -> None:
    """And is not crowded before it holds what the last one did."""
    node = Node()
    node.counted(97)
    node.room.begin()
    assert node.room._due.is_set()
    assert not node.installs.crowded
